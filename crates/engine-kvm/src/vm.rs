//! One VM: memory slots, interrupts that come as messages, the log of written pages, guest time.

use crate::debug::Planted;
use crate::kick::{Shared, reason};
use crate::routes::{PINS, Routes, address, level};
use crate::vcpu::KvmVcpu;
use crate::{cpuid, host_error};
use anyvisor_engine::{DirtyPages, DirtyRegion, Doorbells, Error, Result, Vcpu, VcpuId, Vm};
use anyvisor_x86::msi::DeliveryMode;
use anyvisor_x86::{Cpuid, Msi};
use kvm_bindings as kvm;
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl_iow_nr;

ioctl_iow_nr!(KVM_IOEVENTFD, kvm::KVMIO, 0x79, kvm::kvm_ioeventfd);

/// Three pages below 4 GiB that VT-x without "unrestricted guest" uses for real mode, and one for its identity
/// page table; no memory or chip of a machine is there. QEMU has them there too: firmware knows, and stays away.
const TSS: u64 = 0xfeff_d000;
const IDENTITY_MAP: u64 = 0xfeff_c000;
const RESERVED_END: u64 = TSS + 3 * 4096;

/// Attempts to create a VM while signals interrupt it.
const CREATE_ATTEMPTS: u32 = 10;

/// What a VM's vCPUs share with it.
pub(crate) struct VmShared {
    fd: VmFd,
    /// Level of the 8259's INTR.
    pic_intr: AtomicBool,
    /// The bootstrap processor, which INTR is wired to.
    bsp: OnceLock<Arc<Shared>>,
    routes: Mutex<Routes>,
    logging: Mutex<bool>,
    /// What was asked for; 0 for the host's.
    wanted_tsc_khz: AtomicU64,
    /// Whether hardware scales the TSC for guests. Without, KVM would let a slower one jump ahead at exits.
    scales_tsc: bool,
    tsc_khz: OnceLock<u64>,
    /// MSRs of a state that this KVM has.
    pub msrs: OnceLock<Vec<u32>>,
    /// INT3s in guest memory.
    pub planted: Mutex<Planted>,
    /// Pages that others than vCPUs wrote, which KVM does not see: a bit each, by region.
    written: Vec<Box<[AtomicU64]>>,
    /// Mapped as long as KVM may use it.
    pub memory: GuestMemoryMmap,
}

impl VmShared {
    pub fn pic_intr(&self) -> bool {
        self.pic_intr.load(Ordering::SeqCst)
    }

    /// A level-triggered vector has ended.
    pub fn end_of_interrupt(&self, vector: u8) {
        lock(&self.routes).end(vector);
    }

    /// Whether the end of some level-triggered vector has not been told.
    pub fn awaits_end(&self) -> bool {
        lock(&self.routes).awaits_end()
    }

    /// Lets the end of `vectors`, level-triggered and pending in local APIC `apic_id`, be reported.
    pub fn expect_end(&self, apic_id: u32, vectors: impl Iterator<Item = u8>) -> Result<()> {
        let mut routes = lock(&self.routes);
        let mut changed = false;
        for vector in vectors {
            changed |= routes.deliver(level(apic_id, vector));
        }
        if changed { self.publish(&routes) } else { Ok(()) }
    }

    /// Gives a new vCPU the TSC that is wanted, if it can have it.
    fn scale_tsc(&self, vcpu: &VcpuFd) -> Result<()> {
        let wanted = u32::try_from(self.wanted_tsc_khz.load(Ordering::SeqCst)).unwrap_or(0);
        if wanted == 0 || !self.scales_tsc || vcpu.get_tsc_khz().is_ok_and(|khz| khz == wanted) {
            return Ok(());
        }
        match vcpu.set_tsc_khz(wanted) {
            // A ratio that the hardware does not have: what the vCPU has instead is for others to judge.
            Err(error) if error.errno() != libc::EINVAL => Err(host_error("scaling a vCPU's TSC", error)),
            _ => Ok(()),
        }
    }

    /// A number that says what this KVM has of `capability`, 0 for nothing.
    pub fn capability(&self, capability: u32) -> u32 {
        self.fd.check_extension_raw(capability.into()).max(0) as u32
    }

    fn publish(&self, routes: &Routes) -> Result<()> {
        self.fd.set_gsi_routing(&routes.table()).map_err(|e| host_error("setting a VM's interrupt routes", e))
    }

    /// Marks the pages of `length` bytes at `gpa` as written, as far as they are RAM.
    fn mark_written(&self, gpa: u64, length: u64) {
        let end = gpa.saturating_add(length);
        for (region, bitmap) in self.memory.iter().zip(&self.written) {
            let start = region.start_addr().raw_value();
            let (from, to) = (gpa.max(start), end.min(start + region.len()));
            if from < to {
                for page in (from - start) >> 12..=(to - start - 1) >> 12 {
                    bitmap[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::SeqCst);
                }
            }
        }
    }

    /// Makes the memory slots, or changes their flags.
    fn set_slots(&self, flags: u32) -> Result<()> {
        for (slot, region) in self.memory.iter().enumerate() {
            let slot = kvm::kvm_userspace_memory_region {
                slot: slot as u32,
                flags,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the range is exactly the region's own mapping, which `memory` keeps until KVM's VM is gone:
            // vCPUs hold this struct. Guest memory is only ever accessed as shared.
            unsafe { self.fd.set_user_memory_region(slot) }.map_err(|e| host_error("giving a VM its memory", e))?;
        }
        Ok(())
    }
}

/// Words of a bitmap of the pages of `length` bytes.
fn words(length: u64) -> u64 {
    length.div_ceil(4096).div_ceil(64)
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The VM as the contract sees it.
pub(crate) struct KvmVm(Arc<VmShared>);

impl KvmVm {
    pub fn new(device: &kvm_ioctls::Kvm, memory: GuestMemoryMmap) -> Result<KvmVm> {
        for region in memory.iter() {
            let (start, end) = (region.start_addr().raw_value(), region.start_addr().raw_value() + region.len());
            if start < RESERVED_END && end > IDENTITY_MAP {
                return Err(Error::Unsupported(format!("RAM at {IDENTITY_MAP:#x} is in KVM's way")));
            }
        }
        let fd = create(device)?;
        let failed = |what: &'static str| move |error| host_error(format!("setting a VM's {what}"), error);
        fd.set_identity_map_address(IDENTITY_MAP).map_err(failed("identity map address"))?;
        fd.set_tss_address(TSS as usize).map_err(failed("TSS address"))?;
        for (capability, argument, what) in [
            (kvm::KVM_CAP_SPLIT_IRQCHIP, PINS.into(), "interrupt chips"),
            (kvm::KVM_CAP_X2APIC_API, kvm::KVM_X2APIC_API_USE_32BIT_IDS.into(), "APIC ID format"),
            (kvm::KVM_CAP_EXCEPTION_PAYLOAD, 1, "exception format"),
        ] {
            let enable = kvm::kvm_enable_cap { cap: capability, args: [argument, 0, 0, 0], ..Default::default() };
            fd.enable_cap(&enable).map_err(failed(what))?;
        }
        disable_quirks(&fd)?;
        let shared = VmShared {
            fd,
            pic_intr: AtomicBool::new(false),
            bsp: OnceLock::new(),
            routes: Mutex::default(),
            logging: Mutex::new(false),
            wanted_tsc_khz: AtomicU64::new(0),
            scales_tsc: device.check_extension(Cap::TscControl),
            tsc_khz: OnceLock::new(),
            msrs: OnceLock::new(),
            planted: Mutex::default(),
            written: memory
                .iter()
                .map(|region| (0..words(region.len())).map(|_| AtomicU64::new(0)).collect())
                .collect(),
            memory,
        };
        shared.set_slots(0)?;
        Ok(KvmVm(Arc::new(shared)))
    }
}

/// Turns off what KVM does unlike hardware for the sake of old programs, as far as it can be turned off: a disabled
/// local APIC's page that answers, MWAIT that exists without its CPUID bit, and a CPUID bit for it that follows
/// IA32_MISC_ENABLE (Linux Documentation/virt/kvm/api.rst, KVM_CAP_DISABLE_QUIRKS2).
///
/// What stays on is KVM's rewriting of VMCALL to VMMCALL, for guests that have been told of another vendor.
fn disable_quirks(fd: &VmFd) -> Result<()> {
    const UNWANTED: u32 = kvm::KVM_X86_QUIRK_LAPIC_MMIO_HOLE
        | kvm::KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS
        | kvm::KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT;
    let known = fd.check_extension_raw(kvm::KVM_CAP_DISABLE_QUIRKS2.into()).max(0) as u32;
    if known & UNWANTED == 0 {
        return Ok(());
    }
    let quirks = u64::from(known & UNWANTED);
    let enable =
        kvm::kvm_enable_cap { cap: kvm::KVM_CAP_DISABLE_QUIRKS2, args: [quirks, 0, 0, 0], ..Default::default() };
    fd.enable_cap(&enable).map_err(|e| host_error("turning off KVM's quirks", e))
}

fn create(device: &kvm_ioctls::Kvm) -> Result<VmFd> {
    let mut attempt = 1;
    loop {
        match device.create_vm() {
            Ok(fd) => return Ok(fd),
            Err(error) if error.errno() == libc::EINTR && attempt < CREATE_ATTEMPTS => attempt += 1,
            Err(error) if error.errno() == libc::EBUSY => {
                return Err(Error::Unsupported(
                    "another hypervisor on this host uses VT-x or AMD-V (VirtualBox or VMware, for example): stop it, \
                     or use --engine translator"
                        .into(),
                ));
            }
            Err(error) => return Err(host_error("creating a VM", error)),
        }
    }
}

impl Vm for KvmVm {
    fn create_vcpu(&self, id: VcpuId, table: &Cpuid) -> Result<Box<dyn Vcpu>> {
        let fd: VcpuFd = self.0.fd.create_vcpu(id.0.into()).map_err(|error| match error.errno() {
            libc::EEXIST => Error::Unsupported(format!("vCPU {} exists already", id.0)),
            libc::EINVAL => Error::Unsupported(format!("this KVM has no vCPU {}; use fewer --cpus", id.0)),
            _ => host_error("creating a vCPU", error),
        })?;
        cpuid::apply(&fd, table)?;
        self.0.scale_tsc(&fd)?;
        if let Ok(khz) = fd.get_tsc_khz() {
            // All vCPUs have the same.
            let _ = self.0.tsc_khz.set(khz.into());
        }
        let shared = Arc::new(Shared::new(&fd)?);
        if id.0 == 0 {
            // KVM has just made sure that there is only one.
            let _ = self.0.bsp.set(shared.clone());
        }
        Ok(Box::new(KvmVcpu::new(fd, id.0, table.clone(), self.0.clone(), shared)?))
    }

    fn signal_msi(&self, msi: Msi) -> Result<()> {
        let Some(mode) = msi.delivery_mode() else {
            // A reserved delivery mode is the guest's mistake: nothing arrives.
            return Ok(());
        };
        if msi.is_level() && matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority) {
            let mut routes = lock(&self.0.routes);
            if routes.deliver(msi) {
                self.0.publish(&routes)?;
            }
        }
        let (address_lo, address_hi) = address(msi);
        let message = kvm::kvm_msi { address_lo, address_hi, data: msi.data, ..Default::default() };
        // That no local APIC accepted it is not an error.
        self.0.fd.signal_msi(message).map_err(|e| host_error("sending an interrupt message", e))?;
        Ok(())
    }

    fn set_pic_intr(&self, level: bool) -> Result<()> {
        self.0.pic_intr.store(level, Ordering::SeqCst);
        if level && let Some(bsp) = self.0.bsp.get() {
            bsp.interrupt(reason::PIC);
        }
        Ok(())
    }

    fn want_tsc_khz(&self, khz: u64) {
        self.0.wanted_tsc_khz.store(khz, Ordering::SeqCst);
    }

    fn tsc_khz(&self) -> Result<u64> {
        let khz = self.0.tsc_khz.get().copied();
        khz.ok_or_else(|| Error::Unsupported("this KVM does not tell the TSC's frequency".into()))
    }

    fn clock(&self) -> Result<u64> {
        Ok(self.0.fd.get_clock().map_err(|e| host_error("reading a VM's clock", e))?.clock)
    }

    fn set_clock(&self, ns: u64) -> Result<()> {
        let clock = kvm::kvm_clock_data { clock: ns, ..Default::default() };
        self.0.fd.set_clock(&clock).map_err(|e| host_error("setting a VM's clock", e))
    }

    fn log_dirty(&self, on: bool) -> Result<()> {
        let mut logging = lock(&self.0.logging);
        if on && *logging {
            // A log that is started anew starts empty.
            self.0.set_slots(0)?;
        }
        self.0.set_slots(if on { kvm::KVM_MEM_LOG_DIRTY_PAGES } else { 0 })?;
        self.0.written.iter().flatten().for_each(|word| word.store(0, Ordering::SeqCst));
        *logging = on;
        Ok(())
    }

    /// The processor keeps its instructions coherent with what is written.
    fn memory_written(&self, gpa: u64, length: u64) {
        if *lock(&self.0.logging) {
            self.0.mark_written(gpa, length);
        }
    }

    fn take_dirty(&self) -> Result<DirtyPages> {
        if !*lock(&self.0.logging) {
            return Err(Error::Unsupported("written pages are not being logged".into()));
        }
        let regions = self.0.memory.iter().zip(&self.0.written).enumerate().map(|(slot, (region, written))| {
            let log = self.0.fd.get_dirty_log(slot as u32, region.len() as usize);
            let mut bitmap = log.map_err(|e| host_error("reading the log of written pages", e))?;
            for (word, more) in bitmap.iter_mut().zip(written) {
                *word |= more.swap(0, Ordering::SeqCst);
            }
            Ok(DirtyRegion { start: region.start_addr().raw_value(), bitmap })
        });
        Ok(DirtyPages { regions: regions.collect::<Result<_>>()? })
    }

    fn doorbells(&self) -> Option<&dyn Doorbells> {
        Some(self)
    }
}

impl Doorbells for KvmVm {
    fn attach_write(&self, gpa: u64, length: u32, event: &EventFd) -> Result<()> {
        // kvm-ioctls takes the length from the value to match; here any value matches.
        let request =
            kvm::kvm_ioeventfd { addr: gpa, len: length, fd: event.as_raw_fd(), flags: 0, ..Default::default() };
        // SAFETY: `fd` is a VM's, and KVM only reads the structure.
        let status = unsafe { vmm_sys_util::ioctl::ioctl_with_ref(&self.0.fd, KVM_IOEVENTFD(), &request) };
        if status != 0 {
            return Err(Error::last_os(format!("attaching an event to writes of {length} bytes at {gpa:#x}")));
        }
        Ok(())
    }

    fn attach_interrupt(&self, event: &EventFd, msi: Msi) -> Result<()> {
        if msi.is_level() {
            return Err(Error::Unsupported("an event cannot deliver a level-triggered message".into()));
        }
        let mut routes = lock(&self.0.routes);
        let Some(gsi) = routes.attach(msi) else {
            return Err(Error::Unsupported("too many interrupts by event; use fewer devices or queues".into()));
        };
        let attached = self.0.publish(&routes).and_then(|()| {
            self.0.fd.register_irqfd(event, gsi).map_err(|e| host_error("attaching an event to an interrupt", e))
        });
        if attached.is_err() {
            routes.detach_last();
        }
        attached
    }
}
