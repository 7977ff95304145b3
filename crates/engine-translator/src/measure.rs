//! What an interception was, for those who count them ([`Tally`](anyvisor_engine::tally::Tally)).
//!
//! What happens in the middle of another, an access to a device or an exception, says so in [`Core::met`]; whoever
//! measures the whole looks there for its name. An exception's delivery is counted where it happens, and the
//! instruction that raised it is not counted again.

use crate::core::Core;
use crate::interpret::{self, Step, decode_at};
use crate::system;
use anyvisor_engine::GuestIo;
use anyvisor_engine::tally::event;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// [`interpret::step`], measured.
pub fn step(core: &mut Core, io: &dyn GuestIo) -> Step {
    if !core.meter.is_on() {
        return interpret::step(core, io);
    }
    let rip = core.cpu.rip;
    let name = decode_at(core, rip).map_or(event::EXCEPTION, |fetched| name(&fetched.instruction));
    core.met = None;
    let began = core.meter.start();
    let step = interpret::step(core, io);
    match core.met.take() {
        Some(event::EXCEPTION) => {}
        met => core.meter.stop(began, met.unwrap_or(name)),
    }
    step
}

/// [`system::poll_events`], measured.
pub fn poll(core: &mut Core, io: &dyn GuestIo) -> Step {
    core.met = None;
    let began = core.meter.start();
    let step = system::poll_events(core, io);
    core.meter.stop(began, core.met.unwrap_or(event::POLL));
    step
}

/// An interpreted instruction's kind: privileged and sensitive ones by name.
fn name(instruction: &Instruction) -> &'static str {
    use Mnemonic::*;
    match instruction.mnemonic() {
        In | Out | Insb | Insw | Insd | Outsb | Outsw | Outsd => event::IO_PORT,
        Mov | Push | Pop => match system_register(instruction) {
            Some(name) => name,
            None => event::INTERPRETATION,
        },
        Cpuid | Rdtsc | Rdtscp | Rdpid | Rdpmc | Pushf | Pushfd | Pushfq | Popf | Popfd | Popfq | Iret | Iretd
        | Iretq | Int | Int1 | Int3 | Into | Syscall | Sysret | Sysretq | Sysenter | Sysexit | Sysexitq | Swapgs
        | Cli | Sti | Clac | Stac | Lds | Les | Lfs | Lgs | Lss | Lldt | Ltr | Sldt | Str | Sgdt | Sidt | Lgdt
        | Lidt | Lar | Lsl | Verr | Verw | Arpl | Rdfsbase | Rdgsbase | Wrfsbase | Wrgsbase | Hlt | Clts | Smsw
        | Lmsw | Invlpg | Invpcid | Invd | Wbinvd | Wbnoinvd | Xgetbv | Xsetbv | Rdmsr | Wrmsr | Vmcall | Vmmcall
        | Retf | Pause => upper(instruction.mnemonic()),
        Call | Jmp if instruction.is_call_far() || instruction.is_jmp_far() => "far branch",
        _ if instruction.is_privileged() => upper(instruction.mnemonic()),
        _ => event::INTERPRETATION,
    }
}

/// The kind of system register that a MOV, PUSH or POP moves.
fn system_register(instruction: &Instruction) -> Option<&'static str> {
    let registers = (0..instruction.op_count())
        .filter(|&n| instruction.op_kind(n) == OpKind::Register)
        .map(|n| instruction.op_register(n));
    registers.into_iter().find_map(|register: Register| match register {
        _ if register.is_cr() => Some("MOV CR"),
        _ if register.is_dr() => Some("MOV DR"),
        _ if register.is_segment_register() => Some("segment load"),
        _ => None,
    })
}

/// The mnemonic in capitals. Each is made once.
fn upper(mnemonic: Mnemonic) -> &'static str {
    static NAMES: Mutex<Option<HashMap<Mnemonic, &'static str>>> = Mutex::new(None);
    let mut names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    names
        .get_or_insert_default()
        .entry(mnemonic)
        .or_insert_with(|| Box::leak(format!("{mnemonic:?}").to_uppercase().into_boxed_str()))
}
