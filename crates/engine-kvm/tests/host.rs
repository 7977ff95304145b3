//! What the engine does beyond the conformance suite, on this host's `/dev/kvm`: real mode runs on page-table
//! KVMs too. Skipped, with the reason printed, where there is no KVM.

use anyvisor_engine::{Engine, Exit, GuestIo, Kicker, Vcpu, VcpuId, Vm};
use anyvisor_engine_kvm::Kvm;
use anyvisor_x86::bits::rflags;
use anyvisor_x86::segment::index::{CS, DS, ES, SS};
use anyvisor_x86::{Msi, Segment};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const MEMORY: usize = 0x10_0000;
const CODE: u64 = 0x1000;
const END: u16 = 0xf4;

fn open() -> Option<Kvm> {
    match Kvm::new() {
        Ok(engine) => Some(engine),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

struct Machine {
    vm: Arc<dyn Vm>,
    vcpu: Box<dyn Vcpu>,
    memory: GuestMemoryMmap,
    io: Io,
}

/// Records, and ends runs at a write to [`END`].
struct Io {
    kicker: Kicker,
    out: Mutex<Vec<(u16, Vec<u8>)>>,
    eois: Mutex<Vec<u8>>,
    /// The 8259's answer; 0 for none.
    pic_vector: AtomicU8,
    /// Kicks at each access.
    nervous: AtomicBool,
}

impl GuestIo for Io {
    fn pio_read(&self, _port: u16, data: &mut [u8]) {
        data.fill(0x5a);
        if self.nervous.load(Ordering::SeqCst) {
            self.kicker.kick();
        }
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        self.out.lock().unwrap().push((port, data.to_vec()));
        if port == END || self.nervous.load(Ordering::SeqCst) {
            self.kicker.kick();
        }
    }
    fn mmio_read(&self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _gpa: u64, _data: &[u8]) {}
    fn eoi(&self, vector: u8) {
        self.eois.lock().unwrap().push(vector);
    }
    fn acknowledge_pic(&self) -> Option<u8> {
        let vector = self.pic_vector.swap(0, Ordering::SeqCst);
        (vector != 0).then_some(vector)
    }
}

/// A vCPU in real mode at `code`, with segments at 0 and a stack; interrupt `n` leads to 0x2000 + 16 n.
fn machine(engine: &Kvm, code: &[u8]) -> Machine {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    memory.write_slice(code, GuestAddress(CODE)).unwrap();
    for vector in 0..256u64 {
        memory.write_obj((0x2000 + 16 * vector) as u32, GuestAddress(4 * vector)).unwrap();
    }
    let vm = engine.create_vm(memory.clone()).unwrap();
    let mut vcpu = vm.create_vcpu(VcpuId(0), &engine.supported_cpuid()).unwrap();
    let mut state = vcpu.state().unwrap();
    for segment in [DS, ES, SS] {
        state.segments.seg[segment] = Segment::real_mode(0, false);
    }
    state.segments.seg[CS] = Segment::real_mode(0, true);
    state.rip = CODE;
    state.gpr[4] = 0x8000;
    // Enabled by software, LINT0 for the 8259.
    state.lapic[0xf0..0xf4].copy_from_slice(&0x1ffu32.to_le_bytes());
    state.lapic[0x350..0x354].copy_from_slice(&0x700u32.to_le_bytes());
    vcpu.set_state(&state).unwrap();
    let io = Io {
        kicker: vcpu.kicker(),
        out: Mutex::default(),
        eois: Mutex::default(),
        pic_vector: AtomicU8::new(0),
        nervous: AtomicBool::new(false),
    };
    Machine { vm, vcpu, memory, io }
}

/// `mov al, 1; out 0xf4, al; hlt`.
const FINISH: &[u8] = &[0xb0, 0x01, 0xe6, END as u8, 0xf4];

#[test]
fn an_instruction_is_complete_when_a_kick_returns() {
    let Some(engine) = open() else { return };
    // in al, 0x40; in al, 0x40; ...
    let mut machine = machine(&engine, &[[0xe4u8, 0x40]; 8].concat());
    machine.io.nervous.store(true, Ordering::SeqCst);
    for n in 1..=8u64 {
        assert_eq!(machine.vcpu.run(&machine.io).unwrap(), Exit::Kicked);
        let state = machine.vcpu.state().unwrap();
        assert_eq!((state.rip, state.gpr[0] as u8), (CODE + 2 * n, 0x5a));
    }
}

#[test]
fn no_kick_is_lost() {
    let Some(engine) = open() else { return };
    // jmp $
    let Machine { vm: _vm, mut vcpu, memory: _memory, io } = machine(&engine, &[0xeb, 0xfe]);
    let returned = Arc::new(AtomicBool::new(false));
    let kicks = 300;
    let kicker = vcpu.kicker();
    let told = returned.clone();
    let kicking = std::thread::spawn(move || {
        for n in 0..kicks {
            // At various distances from the vCPU's last return.
            std::thread::sleep(Duration::from_micros(n % 7 * 10));
            kicker.kick();
            let began = Instant::now();
            while !told.swap(false, Ordering::SeqCst) {
                assert!(began.elapsed() < Duration::from_secs(20), "kick {n} is lost");
                std::thread::yield_now();
            }
        }
    });
    for _ in 0..kicks {
        assert_eq!(vcpu.run(&io).unwrap(), Exit::Kicked);
        returned.store(true, Ordering::SeqCst);
    }
    kicking.join().unwrap();
}

#[test]
fn the_8259_wakes_a_halted_processor() {
    let Some(engine) = open() else { return };
    // sti; hlt; and the handler: mov al, 2; out 0xf4, al; hlt
    let mut machine = machine(&engine, &[0xfb, 0xf4, 0xf4]);
    machine.memory.write_slice(&[0xb0, 0x02, 0xe6, END as u8, 0xf4], GuestAddress(0x2000 + 16 * 0x21)).unwrap();
    machine.io.pic_vector.store(0x21, Ordering::SeqCst);
    let vm = machine.vm.clone();
    let raising = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        vm.set_pic_intr(true).unwrap();
    });
    assert_eq!(machine.vcpu.run(&machine.io).unwrap(), Exit::Kicked);
    raising.join().unwrap();
    assert_eq!(*machine.io.out.lock().unwrap(), [(END, vec![2])]);
}

#[test]
fn an_interrupt_of_the_8259_moves_with_the_state() {
    let Some(engine) = open() else { return };
    let mut first = machine(&engine, &[0xf4]);
    let mut state = first.vcpu.state().unwrap();
    state.rflags |= rflags::IF;
    state.events.interrupt = Some(0x22);
    first.vcpu.set_state(&state).unwrap();
    // A kick that is there already ends the run before the guest is entered.
    first.vcpu.kicker().kick();
    assert_eq!(first.vcpu.run(&first.io).unwrap(), Exit::Kicked);
    let state = first.vcpu.state().unwrap();
    assert_eq!(state.events.interrupt, Some(0x22), "not delivered and not lost");

    let mut second = machine(&engine, &[0xf4]);
    second.memory.write_slice(FINISH, GuestAddress(0x2000 + 16 * 0x22)).unwrap();
    second.vcpu.set_state(&state).unwrap();
    assert_eq!(second.vcpu.run(&second.io).unwrap(), Exit::Kicked);
    assert_eq!(*second.io.out.lock().unwrap(), [(END, vec![1])]);
}

#[test]
fn written_pages_are_logged() {
    let Some(engine) = open() else { return };
    // mov [0x5000], al; mov [0x7123], al; finish
    let code = [&[0xa2, 0x00, 0x50, 0xa2, 0x23, 0x71][..], FINISH].concat();
    let mut machine = machine(&engine, &code);
    assert!(machine.vm.take_dirty().is_err(), "nothing is logged yet");
    machine.vm.log_dirty(true).unwrap();
    assert_eq!(machine.vcpu.run(&machine.io).unwrap(), Exit::Kicked);
    let dirty: Vec<u64> = machine.vm.take_dirty().unwrap().addresses().collect();
    assert_eq!(dirty, [0x5000, 0x7000]);
    assert_eq!(machine.vm.take_dirty().unwrap().addresses().count(), 0, "taken");
    let mut state = machine.vcpu.state().unwrap();
    state.rip = CODE;
    machine.vcpu.set_state(&state).unwrap();
    assert_eq!(machine.vcpu.run(&machine.io).unwrap(), Exit::Kicked);
    machine.vm.log_dirty(true).unwrap();
    assert_eq!(machine.vm.take_dirty().unwrap().addresses().count(), 0, "starting forgets");
    machine.vm.log_dirty(false).unwrap();
    assert!(machine.vm.take_dirty().is_err());
}

#[test]
fn the_clock_goes_on_from_where_it_is_set() {
    let Some(engine) = open() else { return };
    let machine = machine(&engine, &[0xf4]);
    const DAY: u64 = 86_400_000_000_000;
    assert!(machine.vm.clock().unwrap() < DAY);
    machine.vm.set_clock(DAY).unwrap();
    let now = machine.vm.clock().unwrap();
    assert!((DAY..2 * DAY).contains(&now), "{now}");
}

#[test]
fn events_replace_callouts() {
    let Some(engine) = open() else { return };
    // The device is behind RAM, where real mode just reaches.
    let Machine { vm, mut vcpu, memory, io } = machine(
        &engine,
        &[
            0xb8, 0xff, 0xff, // mov ax, 0xffff
            0x8e, 0xd8, // mov ds, ax
            0xa3, 0x10, 0x10, // mov [0x1010], ax: 0x101000
            0xfb, // sti
            0xf4, // hlt
        ],
    );
    memory.write_slice(FINISH, GuestAddress(0x2000 + 16 * 0x40)).unwrap();
    let doorbells = vm.doorbells().expect("KVM has them");
    let rung = EventFd::new(EFD_NONBLOCK).unwrap();
    doorbells.attach_write(0x10_1000, 2, &rung).unwrap();
    let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
    doorbells.attach_interrupt(&interrupt, Msi { address: 0xfee0_0000, data: 0x40 }).unwrap();
    interrupt.write(1).unwrap();
    assert_eq!(vcpu.run(&io).unwrap(), Exit::Kicked);
    assert_eq!(rung.read().unwrap(), 1);
    assert_eq!(*io.out.lock().unwrap(), [(END, vec![1])]);
    let level = Msi { address: 0xfee0_0000, data: 0xc041 };
    assert!(doorbells.attach_interrupt(&interrupt, level).is_err(), "level-triggered");
}

#[test]
fn the_end_of_level_triggered_interrupts_is_told() {
    let Some(engine) = open() else { return };
    let Machine { vm, mut vcpu, memory, io } = machine(&engine, &[0xfb, 0xf4, 0xeb, 0xfd]);
    let mut state = vcpu.state().unwrap();
    // The local APIC's page is out of real mode's reach: FS has a base of its own, as after "unreal mode".
    state.segments.seg[4].base = 0xfee0_0000;
    vcpu.set_state(&state).unwrap();
    // xor eax, eax; mov fs:[0xb0], eax; finish
    let handler = [&[0x66, 0x31, 0xc0, 0x64, 0x66, 0xa3, 0xb0, 0x00][..], FINISH].concat();
    for vector in [0x51u64, 0x52] {
        memory.write_slice(&handler, GuestAddress(0x2000 + 16 * vector)).unwrap();
    }
    for (data, ends) in [(0xc051, &[0x51u8][..]), (0x0052, &[0x51]), (0xc051, &[0x51, 0x51])] {
        let mut state = vcpu.state().unwrap();
        state.rip = CODE;
        vcpu.set_state(&state).unwrap();
        vm.signal_msi(Msi { address: 0xfee0_0000, data }).unwrap();
        assert_eq!(vcpu.run(&io).unwrap(), Exit::Kicked);
        assert_eq!(*io.eois.lock().unwrap(), ends, "after message {data:#x}");
    }
}

/// A TSC of another frequency is what was asked for, or not promised.
#[test]
fn the_tsc_is_scaled_where_it_can_be() {
    let Some(engine) = open() else { return };
    let host = machine(&engine, FINISH).vm.tsc_khz().unwrap();
    for wanted in [host * 4 / 5, host * 5 / 4] {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let vm = engine.create_vm(memory).unwrap();
        vm.want_tsc_khz(wanted);
        let mut vcpu = vm.create_vcpu(VcpuId(0), &engine.supported_cpuid()).unwrap();
        let khz = vm.tsc_khz().unwrap();
        if khz != wanted {
            println!("left out: this KVM does not scale the TSC");
            assert_eq!(khz, host);
        }
        let mut tsc = || vcpu.state().unwrap().msr(anyvisor_x86::msr::IA32_TSC).unwrap();
        let mut measured = || {
            let (before, began) = (tsc(), Instant::now());
            std::thread::sleep(Duration::from_millis(20));
            (tsc() - before) as f64 / began.elapsed().as_secs_f64() / 1000.0
        };
        // A busy machine may come between; 4/5 and 5/4 are further apart than this.
        let right = (0..20).any(|_| (0.95..1.05).contains(&(measured() / khz as f64)));
        assert!(right, "not {khz} kHz");
    }
}
