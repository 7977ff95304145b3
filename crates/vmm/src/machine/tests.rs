//! Machines on an engine whose "guest code" is a closure: what it sees, and how each VM ends.

mod snapshots;

use super::*;
use anyvisor_engine::{Exit, GuestIo, Kick, Vm};
use anyvisor_x86::cpuid::{CpuModel, Cpuid, CpuidResult};
use anyvisor_x86::{Msi, VcpuState};
use std::collections::BTreeSet;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Condvar;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

type Guest = Arc<dyn Fn(&FakeVm, u32, &dyn GuestIo) -> Exit + Send + Sync>;

/// Runs `guest(vm, cpu, io)` as each vCPU's code; a guest that returns `Kicked` waits for a kick.
struct FakeEngine {
    guest: Guest,
    states: Arc<Mutex<Vec<VcpuState>>>,
}

struct FakeVm {
    guest: Guest,
    memory: GuestMemoryMmap,
    messages: Mutex<Vec<Msi>>,
    intr: Mutex<bool>,
    clock: Mutex<u64>,
    tsc_khz: AtomicU64,
    /// Numbers of pages written with [`FakeVm::store`].
    written: Mutex<BTreeSet<u64>>,
    states: Arc<Mutex<Vec<VcpuState>>>,
    kickers: Mutex<Vec<Kicker>>,
    this: std::sync::Weak<FakeVm>,
}

struct FakeVcpu {
    id: u32,
    vm: Arc<FakeVm>,
    kicked: Arc<Kicked>,
}

#[derive(Default)]
struct Kicked(Mutex<bool>, Condvar);

impl Kick for Kicked {
    fn kick(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }
}

impl Engine for FakeEngine {
    fn name(&self) -> &'static str {
        "fake"
    }
    fn supported_cpuid(&self) -> Cpuid {
        let mut cpuid = Cpuid::default();
        let all = CpuidResult { eax: !0, ebx: !0, ecx: !0, edx: !0 };
        for (leaf, subleaf) in [(1, None), (7, Some(0)), (0x8000_0001, None)] {
            cpuid.set(leaf, subleaf, all);
        }
        cpuid
    }
    fn create_vm(&self, memory: GuestMemoryMmap) -> anyvisor_engine::Result<Arc<dyn Vm>> {
        Ok(Arc::new_cyclic(|this| FakeVm {
            guest: self.guest.clone(),
            memory,
            messages: Mutex::default(),
            intr: Mutex::default(),
            clock: Mutex::default(),
            tsc_khz: AtomicU64::new(3_000_000),
            written: Mutex::default(),
            states: self.states.clone(),
            kickers: Mutex::default(),
            this: this.clone(),
        }))
    }
}

impl FakeVm {
    /// Writes memory as a guest does.
    fn store(&self, gpa: u64, value: u64) {
        self.memory.write_obj(value, GuestAddress(gpa)).unwrap();
        self.written.lock().unwrap().insert(gpa >> 12);
    }

    fn load(&self, gpa: u64) -> u64 {
        self.memory.read_obj(GuestAddress(gpa)).unwrap()
    }
}

impl Vm for FakeVm {
    fn create_vcpu(&self, id: VcpuId, _cpuid: &Cpuid) -> anyvisor_engine::Result<Box<dyn Vcpu>> {
        let vm = self.this.upgrade().unwrap();
        let kicked = Arc::<Kicked>::default();
        self.kickers.lock().unwrap().push(Kicker::new(kicked.clone()));
        Ok(Box::new(FakeVcpu { id: id.0, vm, kicked }))
    }
    fn signal_msi(&self, msi: Msi) -> anyvisor_engine::Result<()> {
        self.messages.lock().unwrap().push(msi);
        Ok(())
    }
    fn set_pic_intr(&self, level: bool) -> anyvisor_engine::Result<()> {
        *self.intr.lock().unwrap() = level;
        Ok(())
    }
    fn want_tsc_khz(&self, khz: u64) {
        // As hardware that scales does, within limits.
        if (2_000_000..=4_000_000).contains(&khz) && khz.is_multiple_of(1000) {
            self.tsc_khz.store(khz, Ordering::SeqCst);
        }
    }
    fn tsc_khz(&self) -> anyvisor_engine::Result<u64> {
        Ok(self.tsc_khz.load(Ordering::SeqCst))
    }
    fn clock(&self) -> anyvisor_engine::Result<u64> {
        Ok(*self.clock.lock().unwrap())
    }
    fn set_clock(&self, ns: u64) -> anyvisor_engine::Result<()> {
        *self.clock.lock().unwrap() = ns;
        Ok(())
    }
    fn log_dirty(&self, _on: bool) -> anyvisor_engine::Result<()> {
        self.written.lock().unwrap().clear();
        Ok(())
    }
    fn memory_written(&self, gpa: u64, length: u64) {
        self.written.lock().unwrap().extend(gpa >> 12..=(gpa + length - 1) >> 12);
    }
    fn take_dirty(&self) -> anyvisor_engine::Result<anyvisor_engine::DirtyPages> {
        let mut bitmap = vec![0; (self.memory.last_addr().0 as usize >> 12) / 64 + 1];
        for page in std::mem::take(&mut *self.written.lock().unwrap()) {
            bitmap[(page / 64) as usize] |= 1 << (page % 64);
        }
        Ok(anyvisor_engine::DirtyPages { regions: vec![anyvisor_engine::DirtyRegion { start: 0, bitmap }] })
    }
    fn doorbells(&self) -> Option<&dyn anyvisor_engine::Doorbells> {
        None
    }
}

impl Vcpu for FakeVcpu {
    fn run(&mut self, io: &dyn GuestIo) -> anyvisor_engine::Result<Exit> {
        let exit = (self.vm.guest)(&self.vm, self.id, io);
        if exit == Exit::Kicked {
            let mut kicked = self.kicked.0.lock().unwrap();
            while !std::mem::take(&mut *kicked) {
                kicked = self.kicked.1.wait(kicked).unwrap();
            }
        }
        Ok(exit)
    }
    fn kicker(&self) -> Kicker {
        Kicker::new(self.kicked.clone())
    }
    fn state(&mut self) -> anyvisor_engine::Result<VcpuState> {
        Ok(VcpuState { lapic: vec![0; 1024], ..VcpuState::reset(self.id, 0) })
    }
    fn set_state(&mut self, state: &VcpuState) -> anyvisor_engine::Result<()> {
        self.vm.states.lock().unwrap().push(state.clone());
        Ok(())
    }
    fn set_debug(&mut self, _debug: &anyvisor_engine::GuestDebug) -> anyvisor_engine::Result<()> {
        Ok(())
    }
    fn measure(&mut self, _tally: Option<Arc<anyvisor_engine::tally::Tally>>) {}
}

/// A kernel file that loads, deleted with the value.
struct KernelFile(PathBuf);

impl KernelFile {
    fn new() -> KernelFile {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("anyvisor-vmm-test-{}-{number}", std::process::id()));
        std::fs::write(&path, crate::boot::test_image()).unwrap();
        KernelFile(path)
    }
}

impl Drop for KernelFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn config(kernel: &KernelFile) -> Config {
    Config {
        id: "test".into(),
        firmware: None,
        kernel: kernel.0.clone(),
        initrd: None,
        modules: Vec::new(),
        command_line: "console=ttyS0".into(),
        disks: Vec::new(),
        nets: Vec::new(),
        shares: vec![],
        channel: None,
        memory: 32 << 20,
        huge_pages: crate::config::HugePages::IfThere,
        cpus: 1,
        cpu: CpuModel::V3.into(),
        serial: crate::config::Serial::Null,
        debug_exit: true,
        test_device: false,
        console: crate::config::Console::default(),
        ports: Vec::new(),
        rng: false,
        vsock: None,
        balloon: None,
        on_reboot: OnReboot::Exit,
    }
}

#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);
impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

struct Outcome {
    end: Result<End>,
    screen: Vec<u8>,
    states: Vec<VcpuState>,
}

fn play(
    change: impl FnOnce(&mut Config),
    typed: &[u8],
    guest: impl Fn(&FakeVm, u32, &dyn GuestIo) -> Exit + Send + Sync + 'static,
) -> Outcome {
    let kernel = KernelFile::new();
    let mut config = config(&kernel);
    change(&mut config);
    let screen = Screen::default();
    let output = Arc::new(Output::new(Box::new(screen.clone())).unwrap());
    let input = Input::new();
    input.push(typed);
    let states = Arc::default();
    let engine = FakeEngine { guest: Arc::new(guest), states: Arc::clone(&states) };
    let (control, _remote) = control();
    let end = run(&config, &engine, &output, &input, &control, || Ok(()));
    Outcome { end, screen: screen.0.lock().unwrap().clone(), states: states.lock().unwrap().clone() }
}

fn end_of(guest: impl Fn(&FakeVm, u32, &dyn GuestIo) -> Exit + Send + Sync + 'static) -> End {
    play(|_| {}, b"", guest).end.unwrap()
}

fn outb(io: &dyn GuestIo, port: u16, value: u8) {
    io.pio_write(port, &[value]);
}

fn inb(io: &dyn GuestIo, port: u16) -> u8 {
    let mut data = [0];
    io.pio_read(port, &mut data);
    data[0]
}

#[test]
fn ways_to_end() {
    let power_off = |_: &FakeVm, _, io: &dyn GuestIo| {
        io.pio_write(0x604, &(5u16 << 10 | 1 << 13).to_le_bytes());
        Exit::Kicked
    };
    assert_eq!(end_of(power_off), End::PowerOff);
    for (port, value) in [(0xcf9, 6), (0x64, 0xfe), (0x92, 1)] {
        let reset = move |_: &FakeVm, _, io: &dyn GuestIo| {
            outb(io, port, value);
            Exit::Kicked
        };
        assert_eq!(end_of(reset), End::Reboot, "port {port:#x}");
    }
    let debug_exit = |_: &FakeVm, _, io: &dyn GuestIo| {
        io.pio_write(0xf4, &[21, 0, 0, 0]);
        Exit::Kicked
    };
    assert_eq!(end_of(debug_exit), End::DebugExit(21));
    assert!(matches!(end_of(|_, _, _| Exit::Shutdown), End::TripleFault(text) if text.contains("rip")));
    assert!(matches!(end_of(|_, _, _| Exit::Failed("no such thing".into())), End::Failed(t) if t.contains("no such")));
    assert!(matches!(end_of(|_, _, _| panic!("a bug in the engine")), End::Failed(t) if t.contains("internal error")));
}

#[test]
fn the_debug_exit_port_is_an_option() {
    let outcome = play(
        |config| config.debug_exit = false,
        b"",
        |_, _, io| {
            outb(io, 0xf4, 1);
            assert_eq!(inb(io, 0xf4), 0xff);
            outb(io, 0xcf9, 6);
            Exit::Kicked
        },
    );
    assert_eq!(outcome.end.unwrap(), End::Reboot);
}

#[test]
fn the_test_device_is_an_option() {
    let outcome = play(
        |config| config.test_device = true,
        b"",
        |vm, _, io| {
            io.pio_write(0xe0, &0x4433_2211u32.to_le_bytes());
            assert_eq!((inb(io, 0xe1), inb(io, 0xea)), (0x22, 0x33));
            io.pio_write(0xe4, &0x1000u32.to_le_bytes());
            let mut data = [0; 8];
            io.mmio_write(0xff00_fff8, &[1, 2, 3, 4, 5, 6, 7, 8]);
            io.mmio_read(0xff00_fff8, &mut data);
            assert_eq!(data, [1, 2, 3, 4, 5, 6, 7, 8]);
            // Lines 14 and 20 of the I/O APIC are edges to vectors 41h and 42h.
            for (pin, vector) in [(14, 0x41u32), (20, 0x42)] {
                io.mmio_write(0xfec0_0000, &u32::to_le_bytes(0x10 + 2 * pin));
                io.mmio_write(0xfec0_0010, &vector.to_le_bytes());
            }
            for port in [0x200e, 0x2014, 0x2002] {
                outb(io, port, 1);
                outb(io, port, 0);
            }
            let vectors: Vec<u8> = vm.messages.lock().unwrap().iter().map(|msi| msi.data as u8).collect();
            assert_eq!(vectors, [0x41, 0x42]);
            // The ports around the lines are still PCI's.
            io.pio_read(0x1ffe, &mut data[..4]);
            assert_eq!(data[..4], [0xff; 4]);
            outb(io, 0xf4, 5);
            Exit::Kicked
        },
    );
    assert_eq!(outcome.end.unwrap(), End::DebugExit(5));
    let without = end_of(|_, _, io| {
        outb(io, 0xe0, 1);
        let mut data = [0; 1];
        io.mmio_write(0xff00_0000, &[1]);
        io.mmio_read(0xff00_0000, &mut data);
        outb(io, 0xf4, inb(io, 0xe0) & data[0]);
        Exit::Kicked
    });
    assert_eq!(without, End::DebugExit(0xff));
}

#[test]
fn firmware_leaves_the_test_device_its_memory() {
    let scratch = tempfile::tempdir().unwrap();
    let image = scratch.path().join("firmware");
    let started = |size: u64, test_device| {
        std::fs::File::create(&image).unwrap().set_len(size).unwrap();
        let firmware = crate::config::Firmware { image: image.clone(), variables: None };
        let change = |config: &mut Config| (config.firmware, config.test_device) = (Some(firmware), test_device);
        let guest = move |_: &FakeVm, _, io: &dyn GuestIo| {
            if test_device {
                let mut data = [0];
                io.mmio_write(0xff00_ffff, &[7]);
                io.mmio_read(0xff00_ffff, &mut data);
                assert_eq!(data, [7]);
            }
            outb(io, 0xf4, 5);
            Exit::Kicked
        };
        play(change, b"", guest).end
    };
    for (size, test_device) in [(layout::FLASH_MAX, false), (layout::FLASH_MAX_BESIDE_TEST_DEVICE, true)] {
        assert_eq!(started(size, test_device).unwrap(), End::DebugExit(5));
    }
    for size in [layout::FLASH_MAX_BESIDE_TEST_DEVICE + 4096, layout::FLASH_MAX] {
        let message = started(size, true).unwrap_err().to_string();
        assert!(
            message.contains("--test-device") && message.contains("at most 16320K") && !message.contains('\n'),
            "{message}"
        );
    }
}

#[test]
fn all_vcpus_stop_and_only_the_first_starts_in_the_kernel() {
    let outcome = play(
        |config| config.cpus = 3,
        b"",
        |_, cpu, io| {
            if cpu == 2 {
                outb(io, 0xf4, 7);
            }
            Exit::Kicked
        },
    );
    assert_eq!(outcome.end.unwrap(), End::DebugExit(7));
    assert_eq!(outcome.states.len(), 1);
    assert_eq!(outcome.states[0].rip & 0xfff, 0x200);
}

#[test]
fn a_restart_builds_a_fresh_machine() {
    let boots = Arc::new(std::sync::atomic::AtomicU32::new(0));
    let count = boots.clone();
    let outcome = play(
        |config| config.on_reboot = OnReboot::Restart,
        b"",
        move |vm, _, io| {
            let byte: u8 = vm.memory.read_obj(GuestAddress(0x50_0000)).unwrap();
            assert_eq!((byte, inb(io, 0x3ff)), (0, 0), "memory and chips are fresh");
            vm.memory.write_obj(1u8, GuestAddress(0x50_0000)).unwrap();
            outb(io, 0x3ff, 1);
            if count.fetch_add(1, Ordering::SeqCst) == 2 {
                outb(io, 0xf4, 0);
            } else {
                // Twice: the second must not restart the next machine.
                outb(io, 0xcf9, 6);
                outb(io, 0x64, 0xfe);
            }
            Exit::Kicked
        },
    );
    assert_eq!(outcome.end.unwrap(), End::DebugExit(0));
    assert_eq!(boots.load(Ordering::SeqCst), 3);
}

#[test]
fn the_console_carries_both_directions() {
    let typed: Vec<u8> = (0..1000u32).map(|i| (i % 253) as u8).collect();
    let outcome = play(
        |_| {},
        &typed,
        |vm, _, io| {
            // The first byte comes in while there is no FIFO, whose switching on clears the receiver.
            while inb(io, 0x3fd) & 1 == 0 {
                std::thread::yield_now();
            }
            // FIFO on, receive interrupts, OUT2; IRQ 4 as vector 0x34 at the PIC.
            for (port, value) in
                [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1), (0x21, 0xef), (0x3fa, 1), (0x3fc, 8), (0x3f9, 1)]
            {
                outb(io, port, value);
            }
            let mut echoed = 1;
            while echoed < 1000 {
                while !*vm.intr.lock().unwrap() {
                    std::thread::yield_now();
                }
                assert_eq!(io.acknowledge_pic(), Some(0x34));
                while inb(io, 0x3fd) & 1 != 0 {
                    let byte = inb(io, 0x3f8);
                    outb(io, 0x3f8, byte);
                    echoed += 1;
                }
                outb(io, 0x20, 0x20);
            }
            outb(io, 0xf4, 0);
            Exit::Kicked
        },
    );
    assert_eq!(outcome.end.unwrap(), End::DebugExit(0));
    assert_eq!(outcome.screen, typed[1..]);
}

#[test]
fn the_pit_ticks_through_the_io_apic() {
    let end = end_of(|vm, _, io| {
        // Pin 2, edge, vector 0x30, unmasked; channel 0 in mode 2 at 1 kHz.
        for (select, value) in [(0x15u32, 0u32), (0x14, 0x30)] {
            io.mmio_write(0xfec0_0000, &select.to_le_bytes());
            io.mmio_write(0xfec0_0010, &value.to_le_bytes());
        }
        let mut version = [0; 4];
        io.mmio_write(0xfec0_0000, &1u32.to_le_bytes());
        io.mmio_read(0xfec0_0010, &mut version);
        assert_eq!(version, [0x20, 0, 0x17, 0]);
        for (port, value) in [(0x43, 0x34), (0x40, 0xa9), (0x40, 4)] {
            outb(io, port, value);
        }
        let start = std::time::Instant::now();
        while vm.messages.lock().unwrap().len() < 20 {
            assert!(start.elapsed() < Duration::from_secs(20), "no ticks");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(start.elapsed() > Duration::from_millis(18), "too fast");
        assert!(vm.messages.lock().unwrap().iter().all(|msi| msi.vector() == 0x30));
        outb(io, 0xf4, 0);
        Exit::Kicked
    });
    assert_eq!(end, End::DebugExit(0));
}

#[test]
fn a_stop_from_outside_ends_a_busy_vm() {
    let kernel = KernelFile::new();
    let output = Arc::new(Output::new(Box::new(std::io::sink())).unwrap());
    let engine = FakeEngine { guest: Arc::new(|_, _, _| Exit::Kicked), states: Arc::default() };
    let (control, remote) = control();
    let stopper = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        remote.stop();
    });
    assert_eq!(run(&config(&kernel), &engine, &output, &Input::new(), &control, || Ok(())).unwrap(), End::Stopped);
    stopper.join().unwrap();
}

/// Runs a VM of `cpus` vCPUs on `guest`, with `outside` on a thread of its own.
fn with_outside(
    cpus: u32,
    guest: impl Fn(&FakeVm, u32, &dyn GuestIo) -> Exit + Send + Sync + 'static,
    outside: impl FnOnce(Remote) + Send + 'static,
) -> End {
    let kernel = KernelFile::new();
    let config = Config { cpus, on_reboot: OnReboot::Restart, ..config(&kernel) };
    let output = Arc::new(Output::new(Box::new(std::io::sink())).unwrap());
    let engine = FakeEngine { guest: Arc::new(guest), states: Arc::default() };
    let (control, remote) = control();
    let thread = std::thread::spawn(move || {
        // Whatever happens here, the VM ends.
        struct Stop(Remote);
        impl Drop for Stop {
            fn drop(&mut self) {
                self.0.stop();
            }
        }
        let _stop = Stop(remote.clone());
        outside(remote);
    });
    let end = run(&config, &engine, &output, &Input::new(), &control, || Ok(())).unwrap();
    thread.join().unwrap();
    end
}

#[test]
fn a_paused_vm_stands_still_and_goes_on() {
    let steps = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let count = steps.clone();
    let wait = |done: &dyn Fn() -> bool| {
        let start = std::time::Instant::now();
        while !done() {
            assert!(start.elapsed() < Duration::from_secs(20), "it takes too long");
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    let end = with_outside(
        3,
        move |vm, cpu, io| {
            if cpu == 1 {
                count.fetch_add(1, Ordering::SeqCst);
                // A failed exit would end the VM; this one is like a guest that loops and gets kicked.
                std::thread::sleep(Duration::from_micros(100));
                let mut data = [0];
                io.pio_read(0x61, &mut data);
                let this = vm.kickers.lock().unwrap()[1].clone();
                this.kick();
            }
            Exit::Kicked
        },
        move |remote| {
            let now = || steps.load(Ordering::SeqCst);
            for round in 0..20 {
                let before = now();
                wait(&|| now() > before);
                remote.pause().unwrap();
                remote.pause().unwrap();
                assert_eq!(remote.state(), State::Paused);
                assert!(matches!(remote.press_power_button(), Err(Refused::State(_))));
                let paused_at = now();
                std::thread::sleep(Duration::from_millis(2));
                let cpus = remote.with_paused(|paused| {
                    assert_eq!(paused.board.chips().interrupts.lines & 1 << 4, 0);
                    paused.vcpus.iter_mut().map(|vcpu| vcpu.state().unwrap()).count()
                });
                assert_eq!(cpus.unwrap(), 3);
                assert_eq!((now(), remote.state()), (paused_at, State::Paused), "round {round}");
                remote.resume().unwrap();
                remote.resume().unwrap();
                assert_eq!(remote.state(), State::Running);
            }
            // Of a running VM too, which then runs on.
            let at = steps.clone();
            let moved = remote.with_paused(move |_| {
                let before = at.load(Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(2));
                at.load(Ordering::SeqCst) - before
            });
            assert_eq!(moved.unwrap(), 0);
            assert_eq!(remote.state(), State::Running);
            assert!(!remote.press_power_button().unwrap(), "nobody listens");
            // A paused VM can be stopped, and then knows no more requests.
            remote.pause().unwrap();
            remote.stop();
            wait(&|| remote.state() == State::Ended);
            assert!(matches!(remote.pause(), Err(Refused::Ended)));
            assert!(matches!(remote.with_paused(|_| ()), Err(Refused::Ended)));
        },
    );
    assert_eq!(end, End::Stopped);
}

/// Input and timers wait outside a paused machine.
#[test]
fn chips_of_a_paused_vm_do_not_change() {
    let end = with_outside(
        1,
        |_, _, io| {
            // The RTC's periodic interrupt, 1024 Hz: its flag in register C would rise within a millisecond.
            for (register, value) in [(0x0a, 0x26), (0x0b, 0x42)] {
                outb(io, 0x70, register);
                outb(io, 0x71, value);
            }
            Exit::Kicked
        },
        |remote| {
            std::thread::sleep(Duration::from_millis(20));
            remote.pause().unwrap();
            let look = |remote: &Remote| {
                remote
                    .with_paused(|paused| {
                        let chips = paused.board.chips();
                        format!("{:?} {:?} {}", *chips.rtc, *chips.serial, chips.interrupts.lines)
                    })
                    .unwrap()
            };
            let before = look(&remote);
            std::thread::sleep(Duration::from_millis(20));
            assert_eq!(look(&remote), before);
            remote.stop();
        },
    );
    assert_eq!(end, End::Stopped);
}

/// Requests while a VM restarts and restarts go to one that runs, and every one is answered.
#[test]
fn requests_survive_restarts() {
    let boots = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let count = boots.clone();
    let end = with_outside(
        2,
        move |_, cpu, io| {
            if cpu == 1 && count.fetch_add(1, Ordering::SeqCst) < 30 {
                outb(io, 0xcf9, 6);
            }
            Exit::Kicked
        },
        move |remote| {
            while boots.load(Ordering::SeqCst) <= 30 {
                remote.pause().unwrap();
                remote.resume().unwrap();
                remote.with_paused(|paused| assert_eq!(paused.vcpus.len(), 2)).unwrap();
            }
            remote.stop();
        },
    );
    assert_eq!(end, End::Stopped);
}

/// A console's reader who does not read.
struct Stalled(mpsc::Receiver<()>);

impl Write for Stalled {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let _ = self.0.recv();
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Input that waits for the serial port, which waits for a reader, does not stop the timers.
#[test]
fn a_stalled_console_does_not_stop_the_timers() {
    let kernel = KernelFile::new();
    let (hold, held) = mpsc::channel();
    let output = Arc::new(Output::new(Box::new(Stalled(held))).unwrap());
    let input = Input::new();
    let (done, finished) = mpsc::channel();
    let guest = move |vm: &FakeVm, cpu, io: &dyn GuestIo| {
        if cpu == 0 {
            (0..200_000).for_each(|_| outb(io, 0x3f8, b'x'));
            return Exit::Kicked;
        }
        std::thread::sleep(Duration::from_millis(100));
        for (select, value) in [(0x15u32, 0u32), (0x14, 0x30)] {
            io.mmio_write(0xfec0_0000, &select.to_le_bytes());
            io.mmio_write(0xfec0_0010, &value.to_le_bytes());
        }
        for (port, value) in [(0x43, 0x34), (0x40, 0xa9), (0x40, 4)] {
            outb(io, port, value);
        }
        let start = std::time::Instant::now();
        while vm.messages.lock().unwrap().len() < 20 && start.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(1));
        }
        done.send(vm.messages.lock().unwrap().len()).unwrap();
        Exit::Kicked
    };
    let engine = FakeEngine { guest: Arc::new(guest), states: Arc::default() };
    let (control, remote) = control();
    let typist = input.clone();
    let typing = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        typist.offer(b"hello");
    });
    let outside = std::thread::spawn(move || {
        let ticks = finished.recv();
        remote.stop();
        ticks.unwrap()
    });
    let config = Config { cpus: 2, ..config(&kernel) };
    assert_eq!(run(&config, &engine, &output, &input, &control, || Ok(())).unwrap(), End::Stopped);
    assert!(outside.join().unwrap() >= 20, "the timers stand still");
    typing.join().unwrap();
    drop(hold);
}

#[test]
fn a_reader_who_does_not_read_keeps_no_vm_from_pausing() {
    let kernel = KernelFile::new();
    let (hold, held) = mpsc::channel();
    let output = Arc::new(Output::new(Box::new(Stalled(held))).unwrap());
    let guest = |vm: &FakeVm, _, io: &dyn GuestIo| {
        (0..100_000).for_each(|_| outb(io, 0x3f8, b'x'));
        vm.kickers.lock().unwrap()[0].kick();
        Exit::Kicked
    };
    let engine = FakeEngine { guest: Arc::new(guest), states: Arc::default() };
    let (control, remote) = control();
    let outside = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        remote.pause().unwrap();
        remote.resume().unwrap();
        remote.pause().unwrap();
        remote.stop();
    });
    assert_eq!(run(&config(&kernel), &engine, &output, &Input::new(), &control, || Ok(())).unwrap(), End::Stopped);
    outside.join().unwrap();
    drop(hold);
}

#[test]
fn what_cannot_be_built_is_a_users_mistake() {
    for change in [
        |config: &mut Config| config.memory = 1 << 20,
        |config: &mut Config| config.cpus = 1000,
        |config: &mut Config| config.kernel = "/nonexistent/vmlinuz".into(),
        |config: &mut Config| config.kernel = "/".into(),
        |config: &mut Config| config.firmware = Some("/nonexistent/bios".parse().unwrap()),
        |config: &mut Config| config.initrd = Some("/nonexistent/initrd".into()),
        |config: &mut Config| config.modules = vec!["/nonexistent/module".parse().unwrap()],
    ] {
        let error = play(change, b"", |_, _, _| Exit::Kicked).end.unwrap_err();
        assert!(matches!(error, Error::User(_)) && !error.to_string().contains('\n'), "{error}");
    }
}

/// Any access to any address leaves the machine standing.
#[test]
fn random_accesses_harm_nobody() {
    let end = end_of(|_, _, io| {
        let mut random = 0x2545_f491_4f6c_dd1du64;
        let mut next = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        for _ in 0..200_000 {
            let size = 1 << (next() % 4);
            let mut data = next().to_le_bytes();
            let port = next() as u16 & if next() % 2 == 0 { 0xfff } else { 0x7f };
            // Not the ports that end the VM.
            let ends = [0xf4..0xf8, 0x600..0x610, 0xcf9..0xcfa, 0x64..0x65, 0x92..0x93];
            if !ends.iter().any(|range| port + 4 > range.start && port < range.end) {
                io.pio_write(port, &data[..size.min(4)]);
            }
            io.pio_read(port, &mut data[..size.min(4)]);
            let bases = [0xfec0_0000u64, crate::layout::ECAM, crate::layout::PCI_WINDOW, u64::MAX - 4];
            let gpa = bases[(next() % 4) as usize].wrapping_add(next() % 0x60);
            io.mmio_write(gpa, &data[..size]);
            io.mmio_read(gpa, &mut data[..size]);
            io.eoi(next() as u8);
            io.acknowledge_pic();
        }
        outb(io, 0xf4, 3);
        Exit::Kicked
    });
    assert_eq!(end, End::DebugExit(3));
}
