//! What a host, or an emulator of hardware virtualization, is known not to be able to run: by name, with a
//! reason for each. Anything that is not listed here must pass.

/// Cases that a host cannot run, or fails in a known way.
#[derive(Clone, Copy, Debug)]
pub struct Limit {
    /// Parts of the cases' names.
    pub cases: &'static [&'static str],
    /// Part of what a case says when it fails; it is run, and may pass. `None`: it is not run at all.
    pub seen: Option<&'static str>,
    pub reason: &'static str,
}

impl Limit {
    /// Whether this is about the case called `name`.
    pub fn covers(&self, name: &str) -> bool {
        self.cases.iter().any(|part| name.contains(part))
    }
}

/// A host with its limits.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// As on the runner's command line.
    pub name: &'static str,
    pub what: &'static str,
    pub limits: &'static [Limit],
}

/// All hosts that have limits.
pub const ALL: &[Host] = &[KVM, QEMU_SVM, BOCHS_VMX, PAGE_TABLES];

/// What KVM itself does not do, on any processor.
const KVM_EMULATOR: Limit = Limit {
    cases: &["MMIO: an SSE instruction that computes", "MMIO: an x87 load and store"],
    seen: Some("KVM cannot emulate an instruction"),
    reason: "KVM emulates accesses to devices, and its emulator has no arithmetic of SSE and x87",
};
const KVM_EMULATOR_USER: Limit = Limit {
    cases: &["MMIO: an SSE instruction that computes [user]", "MMIO: an x87 load and store [user]"],
    seen: Some("got in vector 0x6"),
    reason: "what KVM's emulator does not know is #UD at CPL 3",
};

const KVM_STEPS: Limit = Limit {
    cases: &["debugger: a step into an exception", "debugger: a step over HLT halts"],
    seen: Some("RIP"),
    reason: "KVM steps by TF, which an event's delivery clears; the step ends once its handler has returned",
};

const KVM_TASKS: Limit = Limit {
    cases: &["task switches: the T flag of a TSS raises #DB"],
    seen: Some("expected vector 0x1, got Kicked"),
    reason: "KVM switches tasks itself, without the T flag",
};

const KVM_IO_BREAKPOINTS: Limit = Limit {
    cases: &["breakpoints: an I/O breakpoint with CR4.DE"],
    seen: Some("got at the end of the code"),
    reason: "KVM emulates port I/O without I/O breakpoints",
};

/// KVM on a processor with hardware virtualization.
const KVM: Host = Host {
    name: "kvm",
    what: "KVM on hardware",
    limits: &[KVM_EMULATOR, KVM_EMULATOR_USER, KVM_STEPS, KVM_TASKS, KVM_IO_BREAKPOINTS],
};

/// kvm_amd in QEMU 7.2's TCG (target/i386/tcg).
const QEMU_SVM: Host = Host {
    name: "qemu-svm",
    what: "kvm_amd in QEMU's TCG",
    limits: &[
        KVM_EMULATOR,
        KVM_EMULATOR_USER,
        KVM_STEPS,
        Limit {
            cases: &[
                "debugger: a hardware breakpoint",
                "debugger: a watchpoint",
                "debugger: a write watchpoint",
                "debugger: an access watchpoint",
                "debugger: the flags at a breakpoint",
                "debugger: code that the debugger changed",
                "debugger: what no processor has",
                "debugger: four hardware breakpoints",
                "debugger: the guest's debug registers",
                "debugger: the guest's breakpoints",
            ],
            seen: None,
            reason: "QEMU's VMRUN loads DR7 and does not act on it",
        },
        Limit {
            cases: &["debugger: a software breakpoint"],
            seen: Some("expected (Debug(Software)"),
            reason: "QEMU does not intercept INT3's exception",
        },
        Limit {
            cases: &["[protected user]", "[vm86]", "IRET: to virtual-8086 mode"],
            seen: None,
            reason: "QEMU aborts at a change of 32-bit stacks: it takes the busy TSS of a VMCB for no TSS",
        },
        Limit {
            cases: &[
                "the I/O bitmap lets CPL 3 use a port",
                "interrupts return to where they came from [user]",
                "kicks: a kick during a call-out ends the run behind the instruction [user]",
                "a guest goes on in a fresh VM from wherever it was [user]",
                "a conforming segment in a gate keeps the CPL [user]",
            ],
            seen: Some("expected "),
            reason: "for the same reason it refuses the I/O bitmap's ports at CPL 3",
        },
        Limit {
            cases: &["mode switches: turning on paging with LME but without PAE is #GP"],
            seen: None,
            reason: "QEMU never comes back from this one",
        },
        Limit {
            cases: &["SYSRET takes RFLAGS from R11 but for RF, VM and reserved bits"],
            seen: Some("expected 207ed5, got 227ed5"),
            reason: "QEMU's SYSRET takes VM from R11",
        },
        Limit {
            cases: &["delivery: RF is set in the frame of"],
            seen: Some("RF of the frame: expected 10000, got 0"),
            reason: "QEMU does not set RF in a fault's frame",
        },
        Limit {
            cases: &[
                "INT3 checks the gate's DPL",
                "INT3 through an absent gate",
                "INT 0x40 checks the gate's DPL",
                "INT 0x40 through an absent gate",
                "INTO checks the gate's DPL",
                "delivery: a non-canonical RSP0 is #SS [user]",
            ],
            seen: Some("error code and RIP"),
            reason: "QEMU computes error codes of long mode with gates of 16 bytes, and shows RIP behind an INT n whose \
                     delivery faults",
        },
        Limit {
            cases: &["an unaligned load with AM and AC is #AC at CPL 3"],
            seen: Some("got at the end of the code"),
            reason: "QEMU checks no alignment",
        },
        Limit {
            cases: &["debug registers: INT1 sets nothing in DR6"],
            seen: Some("got in vector 0x6"),
            reason: "QEMU's INT1 in a guest is #UD",
        },
        Limit { cases: &["INT1 is a trap"], seen: Some("got in vector 0x6"), reason: "QEMU's INT1 in a guest is #UD" },
        Limit {
            cases: &[
                "exceptions: INT n beyond the IDT's limit is #GP",
                "delivery: a gate that is no gate is #GP",
                "delivery: a 16-bit gate in long mode is #GP",
                "delivery: an exception through an absent gate is #NP with EXT",
                "delivery: #UD and #NP do not: the second is delivered",
            ],
            seen: Some("error code and RIP"),
            reason: "QEMU computes error codes of long mode with gates of 16 bytes, and without EXT",
        },
        Limit {
            cases: &[
                "delivery: a gate that is no gate is #GP [protected]",
                "delivery: a null selector in a gate is #GP",
                "delivery: a data segment in a gate is #GP of its selector",
                "delivery: a selector beyond the GDT in a gate is #GP of it",
                "delivery: an absent code segment in a gate is #NP of its selector",
                "delivery: a user code segment in a gate is #GP at CPL 0",
                "delivery: 32-bit code in a 64-bit gate is #GP",
                "delivery: a vector beyond the table is #GP [real]",
            ],
            seen: Some("error code and RIP"),
            reason: "QEMU shows RIP behind an INT n whose delivery faults",
        },
        Limit {
            cases: &[
                "delivery: an exception beyond the IDT is #GP with EXT",
                "delivery: #GP and #NP become #DF with error code 0",
                "delivery: #DE and #NP become #DF",
                "delivery: #PF and #NP become #DF",
                "delivery: an absent gate of #DF is a shutdown",
            ],
            seen: Some("expected "),
            reason: "QEMU forgets the first of two faults when the second is one of delivery",
        },
        Limit {
            cases: &["exceptions: an unmasked SSE exception"],
            seen: Some("got at the end of the code"),
            reason: "QEMU raises no SSE exceptions",
        },
        Limit {
            cases: &["IRET: restores RF"],
            seen: Some("RFLAGS: expected 0, got 10000"),
            reason: "QEMU does not clear RF behind the instruction that it let pass",
        },
        Limit {
            cases: &["IRET: an absent SS raises vector 12"],
            seen: Some("got in vector 0xb"),
            reason: "QEMU raises #NP for an absent stack segment of IRET",
        },
        Limit {
            cases: &["breakpoints: ", "debug registers: "],
            seen: None,
            reason: "QEMU does not act on DR7 of a VMCB, and keeps breakpoints that a guest has set for its later guests",
        },
        Limit {
            cases: &["state: what is set comes back"],
            seen: Some("MSRs: expected"),
            reason: "AMD's SYSENTER_ESP and SYSENTER_EIP have 32 bits",
        },
        Limit {
            cases: &["code that changes: a store to the next instruction"],
            seen: Some("RAX: expected 77"),
            reason: "QEMU does not see a block that changes itself in a guest",
        },
        Limit {
            cases: &["exceptions: reserved bits in MXCSR are #GP", "FXSAVE: FXRSTOR of reserved MXCSR bits is #GP"],
            seen: Some("got at the end of the code"),
            reason: "QEMU does not check MXCSR",
        },
        Limit {
            cases: &["exceptions: LOCK before MOV is #UD", "exceptions: C6h /1 is #UD"],
            seen: Some("got at the end of the code"),
            reason: "QEMU's decoder takes these for valid",
        },
        Limit {
            cases: &[
                "exceptions: a load that runs into non-canonical addresses is #GP",
                "exceptions: PUSH to a non-canonical address is #SS",
                "exceptions: a load by RBP from a non-canonical address is #SS",
                "exceptions: a jump to a non-canonical address is #GP at the jump",
                "exceptions: a call to a non-canonical address pushes nothing",
                "exceptions: a return to a non-canonical address is #GP at the RET",
                "IRET: to a non-canonical address is #GP",
                "MSRs: a non-canonical",
                "MSRs: WRGSBASE of a non-canonical address is #GP",
                "descriptor tables: LGDT of a non-canonical base is #GP",
            ],
            seen: Some("expected "),
            reason: "QEMU checks for canonical addresses at data accesses only, and knows no #SS for them",
        },
        Limit {
            cases: &["MMIO: a read-modify-write of a read-only page reads nothing"],
            seen: Some("expected vector 0xe"),
            reason: "QEMU reports a nested page fault of the read first, and KVM's emulator completes the write",
        },
        Limit {
            cases: &[
                "page faults: a load with a reserved bit",
                "page faults: a store with a reserved bit",
                "page faults: a reserved bit in a large PDE",
                "page faults: PS in a PML4E is reserved",
                "page faults: NX is reserved without EFER.NXE",
                "paging: a reserved bit of a 1 GiB page",
                "PAE paging: NX without EFER.NXE is reserved",
            ],
            seen: Some("error code and RIP"),
            reason: "QEMU's page faults of reserved bits have no P bit",
        },
        Limit {
            cases: &["page faults: SMAP: AC does not help an access to the LDT"],
            seen: Some("expected vector 0xe"),
            reason: "QEMU reads descriptor tables past SMAP",
        },
        Limit {
            cases: &[
                "paging: bit 63 of CR3 without PCIDE is #GP",
                "control registers: CR3 with bits beyond physical addresses is #GP",
            ],
            seen: Some("the processor refused to enter the guest"),
            reason: "QEMU lets a guest load such a CR3, and then does not enter it",
        },
        Limit {
            cases: &[
                "PAE paging: a reserved bit in a pointer is #GP at the load of CR3",
                "control registers: CR0 with a bit above 31 is #GP",
                "control registers: CR4 with a bit above 31 is #GP",
                "interrupts: reserved bits of CR8 are #GP",
                "x2APIC: reserved bits are #GP",
            ],
            seen: Some("got at the end of the code"),
            reason: "QEMU does not check these bits",
        },
        Limit {
            cases: &[
                "segments: ",
                "delivery: an offset beyond the",
                "delivery: an offset beyond the limit of DS is #GP [real]",
            ],
            seen: Some("got "),
            reason: "QEMU checks no segment limits and types at accesses",
        },
        Limit {
            cases: &["delivery: an interrupt stack at CPL 0 leaves SS"],
            seen: Some("SS: expected"),
            reason: "QEMU nulls SS for every interrupt stack",
        },
        Limit {
            cases: &[
                "interrupts: MOV SS holds interrupts off for one instruction",
                "interrupts: POP SS holds interrupts off for one instruction",
                "interrupts: a shadow can be set by the state",
            ],
            seen: Some("RIP of the frame"),
            reason: "QEMU enters guests without the VMCB's interrupt shadow",
        },
        Limit {
            cases: &["HLT: an NMI wakes it with IF clear [real]"],
            seen: Some("RIP of the frame: expected 1, got 0"),
            reason: "QEMU injects into real mode with the RIP of the guest's last exception",
        },
        Limit {
            cases: &["descriptor tables: LLDT of a null selector", "descriptor tables: LTR of a null selector is #GP"],
            seen: Some(""),
            reason: "QEMU keeps the attributes of a null LDTR, and takes a null TR",
        },
        Limit {
            cases: &["SYSCALL and SYSRET: SYSCALL goes to LSTAR"],
            seen: Some("RFLAGS: expected 1, got 0"),
            reason: "QEMU masks RFLAGS before it saves the status flags",
        },
        Limit {
            cases: &["SYSENTER from 64-bit mode [user]", "SYSENTER with a null SYSENTER_CS is #GP [user]"],
            seen: Some("expected "),
            reason: "AMD has no SYSENTER in long mode: #UD",
        },
        Limit {
            cases: &[
                "SYSENTER and SYSEXIT: SYSENTER from 64-bit mode [long]",
                "SYSENTER with a null SYSENTER_CS is #GP [long]",
            ],
            seen: Some("KVM cannot emulate an instruction (0f 34"),
            reason: "AMD has no SYSENTER in long mode, and KVM's emulator has it for Intel's only",
        },
        Limit {
            cases: &[
                "task switches: an exception through a task gate pushes its error code",
                "task switches: the T flag of a TSS raises #DB",
            ],
            seen: Some("expected "),
            reason: "KVM switches tasks for AMD-V itself, without error codes of QEMU's exits and without the T flag",
        },
        Limit {
            cases: &["far transfers: CALL with REX.W pushes quadwords"],
            seen: Some("got 90e2"),
            reason: "QEMU's far CALL ignores REX.W, as AMD's does",
        },
    ],
};

/// kvm_intel in Bochs 2.7. Reasons name the place in Bochs' sources.
///
/// Two more faults of Bochs shape the suite, instead of standing here. `VMexitSaveGuestState` (cpu/vmx.cc) saves a
/// single step as pending though its instruction has not been executed, and `prefetch` (cpu/cpu.cc) clears RF before
/// a fetch that leaves the guest: cases of debug traps use memory first (`Guest::touch`), so that nothing but the case
/// leaves the guest. And a VM entry only ever blocks NMIs: cases with NMIs return from them (`back_from_nmi`).
const BOCHS_VMX: Host = Host {
    name: "bochs-vmx",
    what: "kvm_intel in Bochs",
    limits: &[
        KVM_EMULATOR,
        KVM_EMULATOR_USER,
        KVM_STEPS,
        KVM_TASKS,
        KVM_IO_BREAKPOINTS,
        Limit {
            cases: &["SMSW at CPL 3 with CR4.UMIP is #GP"],
            seen: Some("got at the end of the code"),
            reason: "the emulated CPU has no UMIP, and VT-x lets KVM intercept all that it forbids but SMSW",
        },
        Limit {
            cases: &["delivery: a non-canonical RSP0 is #SS [user]"],
            seen: Some("expected (Some(0), 10000), got (Some(20), 10000)"),
            reason: "Bochs gives the selector of the old SS as the error code (cpu/tasking.cc, get_RSP_from_TSS)",
        },
        Limit {
            cases: &["kicks: a loop with interrupts off"],
            seen: None,
            reason: "Bochs does not leave a guest that it entered with IF clear for the outer Linux's interrupts: it \
                     computes their mask when IF changes, or in the guest, and this is neither (cpu/flag_ctrl_pro.cc, \
                     handleInterruptMaskChange; cpu/vmx.cc loads RFLAGS before it sets in_vmx_guest)",
        },
        Limit {
            cases: &["debugger: a step over I/O is whole"],
            seen: Some("expected (Debug(Step), 10004), got (Debug(Step), 10002)"),
            reason: "Bochs saves a single step as pending when an instruction of I/O leaves the guest (cpu/vmx.cc, \
                     VMexitSaveGuestState), and raises it again when KVM has stepped over that",
        },
        Limit {
            cases: &["single step: SYSCALL with SFMASK.TF is not stepped"],
            seen: Some("RIP: expected 60003, got 9012"),
            reason: "Bochs notes a step before its instruction (cpu/event.cc), and SYSCALL does not take it back",
        },
        Limit {
            cases: &["XSAVE: XSAVE across a page that is absent stores nothing there"],
            seen: Some("got (Some(0), 10000)"),
            reason: "Bochs reads the area's header before it writes (cpu/xsave.cc)",
        },
        Limit {
            cases: &["IRET: an absent SS raises vector 12"],
            seen: Some("got in vector 0xb"),
            reason: "Bochs raises #NP for an absent stack segment of IRET (cpu/iret.cc, long_iret)",
        },
    ],
};

/// A page-table KVM without VT-x or AMD-V: user mode runs on the processor, the rest in KVM's emulator. It serves
/// to see the engine's own work (runs, exits, state) where there is nothing better.
const PAGE_TABLES: Host = Host {
    name: "page-tables",
    what: "KVM by page tables, without hardware virtualization",
    limits: &[
        Limit {
            cases: &[""],
            seen: Some("KVM cannot emulate an instruction"),
            reason: "kernel mode runs in KVM's emulator, which does not know every instruction",
        },
        Limit {
            cases: &[
                "call gates: ",
                "delivery: a TSS too short",
                "delivery: a bad stack selector",
                "delivery: the return address of a trap",
                "delivery: a conforming segment in a gate",
                "descriptor tables: ",
                "exceptions: ",
                "privileged instructions: INT",
                "privileged instructions: IRET",
                "SYSENTER with a null",
            ],
            seen: Some("ot in vector 0x6"),
            reason: "what user mode may not do by itself is emulated, and #UD if KVM's emulator does not know it",
        },
        Limit {
            cases: &["delivery: a conforming segment in a gate"],
            seen: Some("got Some(6)"),
            reason: "INT n at CPL 3 is #UD",
        },
        Limit {
            cases: &[
                "call gates: CALL from CPL 3",
                "SYSENTER from 64-bit mode [user]",
                "IRET: to the same level in protected mode [protected user]",
            ],
            seen: Some("got (9062,"),
            reason: "what user mode may not do by itself is emulated, and #UD if KVM's emulator does not know it",
        },
        Limit {
            cases: &["call gates: CALL from CPL 3"],
            seen: Some("got 9062"),
            reason: "what user mode may not do by itself is emulated, and #UD if KVM's emulator does not know it",
        },
        Limit {
            cases: &["call gates: arguments are copied"],
            seen: Some("ESP: expected"),
            reason: "call gates are not known",
        },
        Limit {
            cases: &["32-bit paging: ", "PAE paging: "],
            seen: Some("got "),
            reason: "it has no paging but that of long mode",
        },
        Limit { cases: &["breakpoints: "], seen: Some("expected vector 0x1"), reason: "it does not act on DR7" },
        Limit {
            cases: &["debugger: "],
            seen: Some("expected (Debug("),
            reason: "KVM_SET_GUEST_DEBUG stops neither at INT3 nor at accesses, and user mode hardly",
        },
        Limit {
            cases: &["debugger: a watchpoint", "debugger: a step over HLT"],
            seen: Some("expected "),
            reason: "KVM_SET_GUEST_DEBUG does not stop at accesses, and HLT does not halt",
        },
        Limit {
            cases: &["debugger: a hardware breakpoint in code that runs already [user]"],
            seen: None,
            reason: "KVM_SET_GUEST_DEBUG does not stop user mode, which then never ends",
        },
        Limit {
            cases: &["breakpoints: a data breakpoint and a single step together"],
            seen: Some("DR6: expected"),
            reason: "it does not act on DR7",
        },
        Limit {
            cases: &["interrupts: "],
            seen: Some("got at the end of the code"),
            reason: "an interrupt that waits for IF is delivered at the next exit",
        },
        Limit {
            cases: &[
                "NMI: an NMI comes before an interrupt",
                "NMI: blocked NMIs are part of the state",
                "state: an NMI that waits",
            ],
            seen: Some("expected vector"),
            reason: "what waits for an IRET is delivered at the next exit",
        },
        Limit {
            cases: &[
                "interrupts: ",
                "local APIC: IRR",
                "x2APIC: ICR to its own ID",
                "moves to a fresh VM: an interrupt in service",
                "state: interrupts that wait",
            ],
            seen: Some("expected "),
            reason: "an interrupt that waits for IF is delivered at the next exit",
        },
        Limit {
            cases: &["CPUID: leaf"],
            seen: Some("EAX, EBX, ECX, EDX: expected ["),
            reason: "CPUID shows the host's features, whatever a vCPU is given",
        },
        Limit {
            cases: &["CPUID: leaf 1 but for OSXSAVE"],
            seen: Some("ECX: expected"),
            reason: "CPUID shows the host's features, whatever a vCPU is given",
        },
        Limit {
            cases: &["CPUID: leaf 1 but for OSXSAVE"],
            seen: Some("EBX: expected"),
            reason: "CPUID shows the host's features, whatever a vCPU is given",
        },
        Limit {
            cases: &["INT1 is a trap that needs no DPL [user]", "INT1 sets nothing in DR6 [user]"],
            seen: Some("RIP of the frame: expected 10001, got 10000"),
            reason: "on AMD's processors INT1 of user mode is delivered with its own address",
        },
        Limit {
            cases: &["far transfers: CALL with REX.W pushes quadwords"],
            seen: Some("got 90e2"),
            reason: "KVM's emulator takes a 64-bit offset here, as Intel's processors do and AMD's do not",
        },
        Limit {
            cases: &["[user]", "[protected user]", "[compat user]"],
            seen: Some("got at the end of the code"),
            reason: "user mode runs with the host's CR0, CR4 and IOPL",
        },
        Limit {
            cases: &[
                "exceptions: an unaligned load with AC alone is fine [user]",
                "privileged instructions: IOPL 3 lets CPL 3",
            ],
            seen: Some(""),
            reason: "user mode runs with the host's CR0, CR4 and IOPL",
        },
        Limit {
            cases: &["delivery: RF is set in the frame of #NM [user]"],
            seen: Some("no exception"),
            reason: "user mode runs with the host's CR0, CR4 and IOPL",
        },
        Limit {
            cases: &["exceptions: an unmasked SSE exception without OSXMMEXCPT"],
            seen: Some("got in vector 0x13"),
            reason: "user mode runs with the host's CR0, CR4 and IOPL",
        },
        Limit {
            cases: &["[vm86]"],
            seen: Some("expected "),
            reason: "it has no virtual-8086 mode: the code runs as if in real mode",
        },
        Limit {
            cases: &[
                "segments: PUSH and POP of FS [user]",
                "segments: a load sets the descriptor's accessed bit [user]",
            ],
            seen: Some("expected "),
            reason: "user mode has the host's descriptor tables",
        },
        Limit {
            cases: &["descriptor tables: LAR of", "descriptor tables: LSL", "descriptor tables: VERR"],
            seen: Some("expected "),
            reason: "user mode has the host's descriptor tables",
        },
        Limit {
            cases: &["SYSCALL and SYSRET: "],
            seen: Some("expected "),
            reason: "SYSCALL is emulated in part: the code goes on at CPL 3 and its MSRs are not looked at",
        },
        Limit {
            cases: &["SYSCALL and SYSRET: SYSCALL and SYSRET, there and back", "SYSCALL without EFER.SCE"],
            seen: Some(""),
            reason: "SYSCALL is emulated in part: the code goes on at CPL 3 and its MSRs are not looked at",
        },
        Limit {
            cases: &["time-stamp counter: ", "state: the time-stamp counter goes on"],
            seen: Some(""),
            reason: "the time-stamp counter is the host's",
        },
        Limit {
            cases: &[
                "exceptions: SLDT is",
                "exceptions: RDFSBASE without",
                "exceptions: SWAPGS outside",
                "exceptions: XGETBV without",
                "FXSAVE: FXSAVE to an unaligned",
                "MSRs: ",
                "control registers: ",
                "descriptor tables: LGDT of a non-canonical",
                "x2APIC: reserved bits",
            ],
            seen: Some("got at the end of the code"),
            reason: "KVM's emulator does not check this",
        },
        Limit {
            cases: &[
                "exceptions: a load that runs into non-canonical",
                "segments: PUSH beyond the limit of SS",
                "IRET: to a non-canonical",
                "IRET: to CPL 3 nulls data segments",
                "SYSCALL and SYSRET: SYSRET to a non-canonical",
                "page faults: a store across a page end writes nothing",
                "MMIO: a read-modify-write of a read-only page",
                "delivery: a vector beyond the table is #GP [real]",
                "debug registers: fixed bits of DR6",
                "single step: ",
            ],
            seen: Some("expected "),
            reason: "KVM's emulator does not do this as processors do",
        },
        Limit {
            cases: &["local APIC: a disabled APIC is memory of devices"],
            seen: Some("RAX: expected 77"),
            reason: "its local APIC answers when it is disabled too",
        },
        Limit {
            cases: &["delivery: "],
            seen: Some("got in vector 0x8"),
            reason: "exceptions of user mode are delivered by KVM's emulator, and a fault of that is #DF",
        },
        Limit {
            cases: &["exceptions: INT3 through an absent gate is #NP [user]"],
            seen: Some("got in vector 0x8"),
            reason: "exceptions of user mode are delivered by KVM's emulator, and a fault of that is #DF",
        },
        Limit {
            cases: &["exceptions: INT3 checks the gate's DPL [user]"],
            seen: Some("got in vector 0x3"),
            reason: "INT3 of user mode is delivered without a look at its gate",
        },
        Limit {
            cases: &["delivery: "],
            seen: Some("got Shutdown"),
            reason: "exceptions of user mode are delivered by KVM's emulator, and a fault of that is a shutdown",
        },
        Limit {
            cases: &["delivery: #PF and #PF become #DF"],
            seen: Some("CR2: expected"),
            reason: "exceptions of user mode are delivered by KVM's emulator, which loses the second fault's address",
        },
        Limit {
            cases: &["exceptions: INT n leads", "exceptions: INT 255"],
            seen: Some("hung"),
            reason: "INT n of real mode is emulated for vectors that BIOSes use only",
        },
        Limit {
            cases: &["task switches: an exception through a task gate"],
            seen: Some("EIP, ESP: expected"),
            reason: "KVM's emulator delivers no exceptions through task gates",
        },
    ],
};

/// The limit that keeps `host` from running the case called `name`.
pub fn of<'a>(host: &'a Host, name: &str) -> Option<&'a Limit> {
    host.limits.iter().find(|limit| limit.seen.is_none() && limit.covers(name))
}

/// The limit of `host` that explains why the case called `name` failed, saying `why`.
pub fn excuse<'a>(host: &'a Host, name: &str, why: &str) -> Option<&'a Limit> {
    host.limits.iter().find(|limit| limit.seen.is_some_and(|seen| why.contains(seen)) && limit.covers(name))
}
