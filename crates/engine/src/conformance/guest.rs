//! The machine of one case: memory, one vCPU in a mode, devices that take notes.

use super::tables::{self, Ending, place};
use super::{Asm, Assembled, End, Mismatch, Mode, Recorder, Verdict};
use crate::memory::in_file;
use crate::{Engine, Exit, Kicker, Result as EngineResult, Vcpu, VcpuId, Vm};
use anyvisor_x86::bits::cr0;
use anyvisor_x86::{Cpuid, Segment, VcpuState};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// When another thread acts on a vCPU that has begun to run, most probably.
pub const A_LITTLE: Duration = Duration::from_millis(20);

/// What cases write code with.
type Assembling = Result<(), IcedError>;

/// See the module.
pub struct Guest<'a> {
    engine: &'a dyn Engine,
    pub mode: Mode,
    pub vm: Arc<dyn Vm>,
    pub vcpu: Box<dyn Vcpu>,
    pub io: Arc<Recorder>,
    pub memory: GuestMemoryMmap,
    /// What the next [`Guest::run`] starts with.
    pub state: VcpuState,
    pub cpuid: Cpuid,
    pub patience: Duration,
    code: Assembled,
    handlers: u64,
}

impl<'a> Guest<'a> {
    /// A machine whose vCPU will start in `mode`.
    pub fn new(engine: &'a dyn Engine, cpuid: &Cpuid, mode: Mode, patience: Duration) -> EngineResult<Guest<'a>> {
        let ranges = [(0, place::MMIO), (place::HIGH_RAM, place::RAM_END - place::HIGH_RAM)];
        let ranges = ranges.map(|(start, size)| (GuestAddress(start), size as usize));
        let memory = if engine.wants_files() {
            in_file(&ranges)
        } else {
            GuestMemoryMmap::from_ranges(&ranges).map_err(std::io::Error::other)
        }
        .map_err(|error| crate::Error::Unsupported(format!("8 MiB of guest memory: {error}")))?;
        tables::write_tables(&memory, mode);
        let vm = engine.create_vm(memory.clone())?;
        let mut vcpu = vm.create_vcpu(VcpuId(0), cpuid)?;
        let mut state = vcpu.state()?;
        tables::enter(&mut state, &memory, mode);
        let io = Arc::new(Recorder::default());
        io.set_ender(vcpu.kicker());
        let code = Assembled::default();
        Ok(Guest { engine, mode, vm, vcpu, io, memory, state, cpuid: cpuid.clone(), patience, code, handlers: 0 })
    }

    /// Another machine of the same kind, new. Its [`Guest::load`]ed code is this one's.
    pub fn sibling(&self) -> EngineResult<Guest<'a>> {
        let other = Guest::new(self.engine, &self.cpuid, self.mode, self.patience)?;
        Ok(Guest { code: self.code.clone(), handlers: self.handlers, ..other })
    }

    /// Runs `code` from the initial state, with an end behind it.
    pub fn run(&mut self, code: impl FnOnce(&mut Asm) -> Assembling) -> Result<End, Mismatch> {
        self.load(code)?;
        self.start()
    }

    /// Puts `code` at [`place::CODE`], with an end behind it, without running it.
    pub fn load(&mut self, code: impl FnOnce(&mut Asm) -> Assembling) -> Result<(), Mismatch> {
        self.code = Assembled::new(self.mode.bits(), self.ip(), code)?;
        self.write(place::CODE, &self.code.bytes);
        self.write(place::CODE + self.code.end(), Ending::of(self.mode).code);
        Ok(())
    }

    /// The RIP of the first instruction.
    pub fn ip(&self) -> u64 {
        if self.mode.is_real_like() { 0 } else { place::CODE }
    }

    /// Sets [`Guest::state`] and runs what is loaded.
    pub fn start(&mut self) -> Result<End, Mismatch> {
        self.vcpu.set_state(&self.state)?;
        self.resume()
    }

    /// Goes on from where the vCPU is.
    pub fn resume(&mut self) -> Result<End, Mismatch> {
        let watch = Watch::new(self.vcpu.kicker(), self.patience);
        let exit = self.vcpu.run(&*self.io)?;
        let hung = watch.stop();
        let state = self.vcpu.state()?;
        let ended = self.io.take_ended();
        if hung && !ended {
            let at = (state.segments.seg[1].selector, state.rip, state.activity);
            return Err(Mismatch(format!("hung for {:?}: CS, RIP, activity {at:x?}", self.patience)));
        }
        if let Exit::Failed(why) = exit {
            return Err(Mismatch(format!("the engine gave up: {why}")));
        }
        let (log, code) = (self.io.take_log(), self.code.clone());
        Ok(End { exit, ended, state, log, mode: self.mode, code, ip: self.ip(), memory: self.memory.clone() })
    }

    /// Has the guest, in its mode, write to each page of its memory below devices, which changes no byte.
    ///
    /// A page's first use may make the engine leave the guest within an instruction, and Bochs takes that for the
    /// instruction's end when it comes to debug traps. Cases about those begin with this.
    pub fn touch(&mut self) -> Verdict {
        let end = self.run(|a| {
            let mut again = a.create_label();
            if a.bitness() == 16 {
                a.xor(ax, ax)?;
                a.xor(bx, bx)?;
                a.set_label(&mut again)?;
                a.mov(es, ax)?;
                a.or(byte_ptr(bx).es(), 0)?;
                a.add(ax, 0x100)?;
                a.cmp(ax, (place::MMIO >> 4) as i32)?;
            } else {
                a.xor(esi, esi)?;
                a.set_label(&mut again)?;
                let at = if a.bitness() == 64 { byte_ptr(rsi) } else { byte_ptr(esi) };
                a.or(at, 0)?;
                a.add(esi, 0x1000)?;
                a.cmp(esi, place::MMIO as i32)?;
            }
            a.jb(again)
        })?;
        end.done()
    }

    /// As [`Guest::run`], while another thread does `act` [`A_LITTLE`] after the state is set.
    pub fn run_while(
        &mut self,
        act: impl FnOnce() + Send,
        code: impl FnOnce(&mut Asm) -> Assembling,
    ) -> Result<End, Mismatch> {
        self.load(code)?;
        self.vcpu.set_state(&self.state)?;
        self.resume_while(act)
    }

    /// As [`Guest::resume`], while another thread does `act` [`A_LITTLE`] later.
    pub fn resume_while(&mut self, act: impl FnOnce() + Send) -> Result<End, Mismatch> {
        std::thread::scope(|scope| {
            let actor = scope.spawn(|| {
                std::thread::sleep(A_LITTLE);
                act();
            });
            let end = self.resume();
            actor.join().expect("what another thread does succeeds");
            end
        })
    }

    /// Replaces the handler of `vector` by `code` of the width of handlers, with an end behind it.
    pub fn handler(&mut self, vector: u8, code: impl FnOnce(&mut Asm) -> Assembling) -> Result<u64, Mismatch> {
        let at = place::CASE_HANDLERS + 256 * self.handlers;
        self.handlers += 1;
        self.code_at(at, self.mode.handler_bits(), code)?;
        tables::write_gate(&self.memory, self.mode, vector, at);
        Ok(at)
    }

    /// Puts `code` for `bits`-bit mode at `address`, with an end behind it.
    pub fn code_at(
        &mut self,
        address: u64,
        bits: u32,
        code: impl FnOnce(&mut Asm) -> Assembling,
    ) -> Result<Assembled, Mismatch> {
        let code = Assembled::new(bits, address, code)?;
        self.write(address, &code.bytes);
        self.write(address + code.end(), Ending::PORT.code);
        Ok(code)
    }

    /// Puts `code` for `bits`-bit mode (32 or 64) at CPL 3 at `address`, with an end behind it; returns the RIP
    /// of a run that got there.
    pub fn user_code_at(
        &mut self,
        address: u64,
        bits: u32,
        code: impl FnOnce(&mut Asm) -> Assembling,
    ) -> Result<u64, Mismatch> {
        let code = Assembled::new(bits, address, code)?;
        let ending = if bits == 64 { Ending::MEMORY_64 } else { Ending::MEMORY_32 };
        self.write(address, &code.bytes);
        self.write(address + code.end(), ending.code);
        Ok(address + code.end() + ending.length)
    }

    /// The address of the gate of `vector`.
    fn gate(&self, vector: u8) -> u64 {
        place::IDT + u64::from(vector) * u64::from(self.mode.handler_bits() / 4)
    }

    /// Sets the type byte of a gate: P, DPL and type; 0x8e is an interrupt gate, 0xef a trap gate of DPL 3.
    pub fn gate_kind(&mut self, vector: u8, kind: u8) {
        self.write(self.gate(vector) + 5, &[kind]);
    }

    /// Sets the interrupt stack of a 64-bit gate.
    pub fn gate_ist(&mut self, vector: u8, ist: u8) {
        self.write(self.gate(vector) + 4, &[ist]);
    }

    /// Sets the selector of a gate.
    pub fn gate_selector(&mut self, vector: u8, selector: u16) {
        self.write(self.gate(vector) + 2, &selector.to_le_bytes());
    }

    /// Writes a descriptor to the GDT.
    pub fn descriptor(&mut self, selector: u16, value: u64) {
        self.write_u64(place::GDT + u64::from(selector & !7), value);
    }

    /// Sets segment register `number` of the initial state from the GDT, without checks.
    pub fn segment(&mut self, number: usize, selector: u16) {
        self.state.segments.seg[number] = self.cached(selector);
    }

    /// What a segment register holds after a load of `selector`.
    pub fn cached(&self, selector: u16) -> Segment {
        tables::segment(&self.memory, selector)
    }

    /// Lets CPL 3 use `port`, below 0x100.
    pub fn allow_port(&mut self, port: u16) {
        tables::allow_port(&self.memory, port);
    }

    /// Sets the page-table entry of the 4 KiB page at `gva`, below 2 MiB. No run is on, and the TLB is
    /// flushed by the next one's [`Guest::start`].
    pub fn map(&mut self, gva: u64, entry: u64) {
        assert!(gva < 2 << 20, "{gva:#x} has no 4 KiB page");
        self.write_u64(place::PT + 8 * (gva >> 12), entry);
    }

    /// Makes all 4 KiB pages supervisor pages (for SMEP and SMAP) but those of `user` and [`place::END`].
    pub fn supervisor_pages(&mut self, user: &[u64]) {
        for gva in (0..512).map(|n| n << 12) {
            if !user.contains(&gva) && gva != place::END {
                self.map(gva, gva | tables::page::P | tables::page::W);
            }
        }
    }

    /// Protected mode with 32-bit paging: 4 MiB identity-mapped by 4 KiB pages with user access, tables at
    /// [`place::TABLES`] (directory) and the page behind it.
    pub fn legacy_paging(&mut self) {
        let (directory, table) = (place::TABLES, place::TABLES + 0x1000);
        self.write(directory, &(table as u32 | 7).to_le_bytes());
        for n in 0..1024u32 {
            self.write(table + 4 * u64::from(n), &(n << 12 | 7).to_le_bytes());
        }
        self.state.cr3 = directory;
        self.state.cr0 |= cr0::PG | cr0::WP;
    }

    /// Protected mode with PAE paging: the tables of long mode under four pointers at [`place::TABLES`].
    pub fn pae_paging(&mut self) {
        self.write_u64(place::TABLES, place::PD | tables::page::P);
        self.state.cr3 = place::TABLES;
        self.state.cr4 |= anyvisor_x86::bits::cr4::PAE;
        self.state.cr0 |= cr0::PG | cr0::WP;
    }

    /// Writes guest memory.
    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(gpa)).expect("the case writes to RAM");
    }

    pub fn write_u64(&self, gpa: u64, value: u64) {
        self.write(gpa, &value.to_le_bytes());
    }

    pub fn write_u32(&self, gpa: u64, value: u32) {
        self.write(gpa, &value.to_le_bytes());
    }

    /// Reads guest memory.
    pub fn read(&self, gpa: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(gpa)).expect("the case reads RAM");
        bytes
    }

    pub fn read_u64(&self, gpa: u64) -> u64 {
        u64::from_le_bytes(self.read(gpa, 8).try_into().expect("eight bytes"))
    }

    pub fn read_u32(&self, gpa: u64) -> u32 {
        u32::from_le_bytes(self.read(gpa, 4).try_into().expect("four bytes"))
    }
}

/// Kicks a vCPU that does not come back.
struct Watch {
    stop: mpsc::Sender<()>,
    hung: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<()>,
}

impl Watch {
    fn new(kicker: Kicker, patience: Duration) -> Watch {
        let (stop, stopped) = mpsc::channel();
        let hung = Arc::new(AtomicBool::new(false));
        let flag = hung.clone();
        let thread = std::thread::spawn(move || {
            if stopped.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
                flag.store(true, Ordering::SeqCst);
                kicker.kick();
            }
        });
        Watch { stop, hung, thread }
    }

    /// Whether the vCPU had to be kicked.
    fn stop(self) -> bool {
        // The thread may have ended by itself.
        let _ = self.stop.send(());
        self.thread.join().expect("the watch does not panic");
        self.hung.load(Ordering::SeqCst)
    }
}
