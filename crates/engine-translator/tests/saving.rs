//! What saving a VM needs of the engine: the log of written pages, and guest time.

use anyvisor_engine::{Engine, Exit, GuestIo, Kicker, Vcpu, VcpuId, Vm};
use anyvisor_engine_translator::Translator;
use anyvisor_x86::Segment;
use anyvisor_x86::bits::{cr0, cr4, efer, gpr};
use anyvisor_x86::cpuid::CpuModel;
use anyvisor_x86::msr;
use anyvisor_x86::segment::{attr, index};
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const CODE: u64 = 0x4000;
const CLOCK: u64 = 0x6000;

/// Kicks the vCPU at any port access.
struct Io(Kicker);

impl GuestIo for Io {
    fn pio_read(&self, _: u16, _: &mut [u8]) {}
    fn pio_write(&self, _: u16, _: &[u8]) {
        self.0.kick();
    }
    fn mmio_read(&self, _: u64, _: &mut [u8]) {}
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn eoi(&self, _: u8) {}
    fn acknowledge_pic(&self) -> Option<u8> {
        None
    }
}

struct Guest {
    memory: GuestMemoryMmap,
    vm: Arc<dyn Vm>,
    vcpu: Box<dyn Vcpu>,
}

impl Guest {
    /// 8 MiB, identity-mapped, with `code` about to run in 64-bit mode.
    fn new(engine: &dyn Engine, code: &[u8]) -> Guest {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 8 << 20)]).unwrap();
        memory.write_obj(0x2003u64, GuestAddress(0x1000)).unwrap();
        memory.write_obj(0x3003u64, GuestAddress(0x2000)).unwrap();
        for page in 0..512 {
            memory.write_obj(page << 12 | 3, GuestAddress(0x10000 + 8 * page)).unwrap();
        }
        memory.write_obj(0x10003u64, GuestAddress(0x3000)).unwrap();
        memory.write_slice(code, GuestAddress(CODE)).unwrap();
        let vm = engine.create_vm(memory.clone()).unwrap();
        let cpuid = CpuModel::Host.table(&engine.supported_cpuid(), 1, 0).unwrap();
        let mut vcpu = vm.create_vcpu(VcpuId(0), &cpuid).unwrap();
        let mut state = vcpu.state().unwrap();
        state.cr0 = cr0::PE | cr0::PG | cr0::ET | cr0::NE;
        state.cr3 = 0x1000;
        state.cr4 = cr4::PAE;
        state.set_msr(msr::EFER, efer::LME | efer::LMA);
        let flat = attr::S | attr::P | attr::G | attr::WRITABLE | attr::ACCESSED;
        let data = Segment { base: 0, limit: u32::MAX, attributes: flat | attr::DB, selector: 0x10 };
        state.segments.seg = [data; 6];
        state.segments.seg[index::CS] =
            Segment { base: 0, limit: u32::MAX, attributes: flat | attr::CODE | attr::L, selector: 8 };
        state.rip = CODE;
        vcpu.set_state(&state).unwrap();
        Guest { memory, vm, vcpu }
    }

    /// Runs from the start of the code to the next port access.
    fn run(&mut self) {
        let mut state = self.vcpu.state().unwrap();
        state.rip = CODE;
        self.vcpu.set_state(&state).unwrap();
        self.resume();
    }

    fn resume(&mut self) {
        let io = Io(self.vcpu.kicker());
        assert_eq!(self.vcpu.run(&io).unwrap(), Exit::Kicked);
    }

    fn dirty(&self) -> Vec<u64> {
        self.vm.take_dirty().unwrap().addresses().collect()
    }
}

fn engines() -> [Translator; 2] {
    [Translator::new().unwrap(), Translator::interpreting().unwrap()]
}

#[test]
fn written_pages_are_logged_each_time_anew() {
    // store: mov byte [0x100000], 1; lock inc dword [0x101000]; out 0xf4, al; jmp store
    let code = [
        0xc6, 0x04, 0x25, 0x00, 0x00, 0x10, 0x00, 0x01, 0xf0, 0xff, 0x04, 0x25, 0x00, 0x10, 0x10, 0x00, 0xe6, 0xf4,
        0xeb, 0xec,
    ];
    for engine in engines() {
        let mut guest = Guest::new(&engine, &code);
        assert!(guest.vm.take_dirty().is_err(), "nothing is logged yet");
        guest.run();
        guest.vm.log_dirty(true).unwrap();
        assert!(guest.dirty().is_empty());
        for _ in 0..3 {
            // Without a state set between, so that the TLB keeps what it may keep.
            guest.resume();
            assert_eq!(guest.dirty(), [0x10_0000, 0x10_1000]);
            assert!(guest.dirty().is_empty(), "taken is gone");
        }
    }
}

#[test]
fn accessed_and_dirty_bits_are_written_pages() {
    // mov al, [0x102000]; out 0xf4, al
    let code = [0x8a, 0x04, 0x25, 0x00, 0x20, 0x10, 0x00, 0xe6, 0xf4];
    for engine in engines() {
        let mut guest = Guest::new(&engine, &code);
        guest.vm.log_dirty(true).unwrap();
        guest.run();
        let page_tables = [0x1000, 0x2000, 0x3000, 0x10000];
        assert_eq!(guest.dirty(), page_tables);
        guest.run();
        assert!(guest.dirty().is_empty(), "a second read changes nothing");
    }
}

#[test]
fn time_goes_on_from_where_it_is_set() {
    // mov ecx, KVM_SYSTEM_TIME_NEW; mov eax, CLOCK | 1; xor edx, edx; wrmsr; out 0xf4, al; out 0xf4, al
    let mut code = vec![0xb9, 0x01, 0x4d, 0x56, 0x4b, 0xb8];
    code.extend((CLOCK as u32 | 1).to_le_bytes());
    code.extend([0x31, 0xd2, 0x0f, 0x30, 0xe6, 0xf4, 0xe6, 0xf4]);
    for engine in engines() {
        let mut guest = Guest::new(&engine, &code);
        guest.run();
        let hour = 3_600_000_000_000;
        // What a guest computes now.
        let shown = |guest: &mut Guest| {
            let word = |offset| guest.memory.read_obj::<u64>(GuestAddress(CLOCK + offset)).unwrap();
            let (tsc, system_time, scale) = (word(8), word(16), word(24));
            let before = guest.vcpu.state().unwrap().msr(msr::IA32_TSC).unwrap();
            let ticks = before.wrapping_sub(tsc);
            let shift = (scale >> 32) as i8;
            let shifted = if shift < 0 { ticks >> -shift } else { ticks << shift };
            let ns = (u128::from(shifted) * u128::from(scale as u32)) >> 32;
            system_time.wrapping_add(ns as u64)
        };
        let (early, clock, late) = (shown(&mut guest), guest.vm.clock().unwrap(), shown(&mut guest));
        assert!(early <= clock && clock <= late && late < hour, "{early} {clock} {late}");
        let version = guest.memory.read_obj::<u32>(GuestAddress(CLOCK)).unwrap();
        guest.vm.set_clock(hour).unwrap();
        let mut state = guest.vcpu.state().unwrap();
        state.set_msr(msr::IA32_TSC, 1 << 40);
        state.gpr[gpr::RAX] = 0;
        guest.vcpu.set_state(&state).unwrap();
        guest.resume();
        let (early, clock, late) = (shown(&mut guest), guest.vm.clock().unwrap(), shown(&mut guest));
        assert!(hour < early && early <= clock && clock <= late && late < 2 * hour, "{early} {clock} {late}");
        let now = guest.memory.read_obj::<u32>(GuestAddress(CLOCK)).unwrap();
        assert!(now != version && now.is_multiple_of(2), "{version} {now}");
        let tsc = guest.vcpu.state().unwrap().msr(msr::IA32_TSC).unwrap();
        assert!((1 << 40..(1 << 40) + (1 << 37)).contains(&tsc), "{tsc:#x}");
    }
}
