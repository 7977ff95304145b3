//! The cases, a file for each part of the architecture.

mod apic;
mod code;
mod debug;
mod debugger;
mod events;
mod exceptions;
mod fpu;
mod identity;
mod interrupts;
mod keys;
mod kicks;
mod machine;
mod mmio;
mod paging;
mod port_io;
mod segments;
mod state;
mod transfers;

use super::{Case, Suite};

/// What the files of cases need.
mod prelude {
    pub(super) use super::super::{Access, Mode, Need, Suite, Verdict, ensure, equal, page, place, selector};
    pub(super) use anyvisor_x86::bits::{cr0, cr4, dr, efer, gpr, rflags, xcr0};
    pub(super) use anyvisor_x86::exception::vector;
    pub(super) use anyvisor_x86::segment::{attr, index};
    pub(super) use anyvisor_x86::{Exception, Msi, Segment, VcpuState, msr};
    pub(super) use iced_x86::code_asm::*;

    /// Every mode.
    pub(super) const EVERY_MODE: &[Mode] = &[
        Mode::Real,
        Mode::Vm86,
        Mode::Protected,
        Mode::ProtectedUser,
        Mode::Compat,
        Mode::CompatUser,
        Mode::Long,
        Mode::User,
    ];
    /// Every mode but real and virtual-8086 mode.
    pub(super) const PROTECTED_MODES: &[Mode] =
        &[Mode::Protected, Mode::ProtectedUser, Mode::Compat, Mode::CompatUser, Mode::Long, Mode::User];
    /// 64-bit modes.
    pub(super) const WIDE: &[Mode] = &[Mode::Long, Mode::User];
}

/// All cases, in order.
pub fn cases() -> Vec<Case> {
    let mut suite = Suite { cases: Vec::new(), group: "", prepare: None };
    exceptions::add(&mut suite);
    port_io::add(&mut suite);
    mmio::add(&mut suite);
    paging::add(&mut suite);
    keys::add(&mut suite);
    events::add(&mut suite);
    interrupts::add(&mut suite);
    apic::add(&mut suite);
    kicks::add(&mut suite);
    identity::add(&mut suite);
    segments::add(&mut suite);
    transfers::add(&mut suite);
    debug::add(&mut suite);
    debugger::add(&mut suite);
    fpu::add(&mut suite);
    code::add(&mut suite);
    state::add(&mut suite);
    machine::add(&mut suite);
    suite.cases
}
