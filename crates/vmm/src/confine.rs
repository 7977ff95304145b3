//! What a vCPU's thread may ask of the host's kernel.
//!
//! Guest code, or what an engine made of it, runs on these threads, so an error in an engine is first of all
//! theirs. They get a seccomp filter with the few system calls that running a guest takes: no file is opened,
//! no process started, no socket made, no memory made executable. Anything else fails with EPERM.
//!
//! The threads share the process's memory with others that may do more: this makes an escape harder, it is
//! no second wall.
#![allow(unsafe_code)]

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::collections::BTreeMap;
use std::io;
use std::sync::OnceLock;

/// System calls with any arguments.
const ALLOWED: &[libc::c_long] = &[
    // Waiting, and waking others.
    libc::SYS_futex,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_sched_yield,
    libc::SYS_restart_syscall,
    libc::SYS_poll,
    // Signals, the vCPU's timer, and its GS base.
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_sigaltstack,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_timer_create,
    libc::SYS_timer_settime,
    libc::SYS_timer_delete,
    libc::SYS_arch_prctl,
    // Descriptors that are open already: event counters, the console, the log, the file with UEFI variables.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    // Memory.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_membarrier,
    libc::SYS_getrandom,
    // The thread's end.
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
];

/// The type of KVM's ioctls (Linux uapi `KVMIO`), and where in a request it is.
const KVM_IOCTL_TYPE: u64 = 0xae << 8;
const IOCTL_TYPE_MASK: u64 = 0xff << 8;

/// Do not turn speculative store bypass off for the thread: before Linux 5.16 a filter does by default.
const SECCOMP_FILTER_FLAG_SPEC_ALLOW: libc::c_ulong = 1 << 2;

fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALLOWED.iter().map(|&call| (call, vec![])).collect();
    let mut only = |call, argument, mask: u64, value: u64| -> Result<(), seccompiler::BackendError> {
        let condition = SeccompCondition::new(argument, Len::Qword, Op::MaskedEq(mask), value)?;
        rules.insert(call, vec![SeccompRule::new(vec![condition])?]);
        Ok(())
    };
    only(libc::SYS_mmap, 2, libc::PROT_EXEC as u64, 0)?;
    only(libc::SYS_mprotect, 2, libc::PROT_EXEC as u64, 0)?;
    only(libc::SYS_ioctl, 1, IOCTL_TYPE_MASK, KVM_IOCTL_TYPE)?;
    only(libc::SYS_tgkill, 0, u64::MAX, u64::from(std::process::id()))?;
    let refuse = SeccompAction::Errno(libc::EPERM as u32);
    SeccompFilter::new(rules, refuse, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

/// Restricts the calling thread, for good.
///
/// # Errors
/// When the host's kernel or container does not take filters.
pub fn this_thread() -> io::Result<()> {
    static FILTER: OnceLock<BpfProgram> = OnceLock::new();
    let program = FILTER.get_or_init(|| filter().expect("the list makes a filter"));
    // Layout of struct sock_fprog (Linux uapi filter.h).
    #[repr(C)]
    struct Program {
        length: libc::c_ushort,
        filter: *const seccompiler::sock_filter,
    }
    let program = Program { length: program.len() as libc::c_ushort, filter: program.as_ptr() };
    // SAFETY: plain system calls; the kernel copies the program, whose instructions are those of a
    // SeccompFilter, laid out as it expects.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                SECCOMP_FILTER_FLAG_SPEC_ALLOW,
                &raw const program,
            ) == 0
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    /// What `what` comes to on a thread that is restricted.
    fn restricted<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> T {
        std::thread::spawn(|| {
            this_thread().expect("this kernel takes filters");
            what()
        })
        .join()
        .expect("nothing is killed")
    }

    #[test]
    fn files_processes_and_sockets_are_out_of_reach() {
        let kinds = restricted(|| {
            [
                std::fs::File::open("/dev/null").map(drop),
                std::process::Command::new("true").status().map(drop),
                std::net::TcpListener::bind("127.0.0.1:0").map(drop),
                std::fs::create_dir("/tmp/never"),
            ]
            .map(|result| result.unwrap_err().kind())
        });
        assert_eq!(kinds, [io::ErrorKind::PermissionDenied; 4]);
        assert!(std::fs::File::open("/dev/null").is_ok(), "other threads are as before");
    }

    #[test]
    fn no_memory_becomes_executable() {
        let errors = restricted(|| {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let rw = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: a fresh anonymous mapping, which is never executed.
            unsafe {
                let executable = libc::mmap(std::ptr::null_mut(), 4096, rw | libc::PROT_EXEC, flags, -1, 0);
                let refused = io::Error::last_os_error();
                assert_eq!(executable, libc::MAP_FAILED);
                let plain = libc::mmap(std::ptr::null_mut(), 4096, rw, flags, -1, 0);
                assert_ne!(plain, libc::MAP_FAILED);
                assert_eq!(libc::mprotect(plain, 4096, libc::PROT_READ | libc::PROT_EXEC), -1);
                [refused, io::Error::last_os_error()]
            }
        });
        assert!(errors.iter().all(|error| error.raw_os_error() == Some(libc::EPERM)), "{errors:?}");
    }

    #[test]
    fn what_a_vcpu_needs_works() {
        let (sender, receiver) = mpsc::channel();
        let bytes = restricted(move || {
            std::thread::sleep(Duration::from_millis(1));
            let bytes = vec![7u8; 32 << 20];
            sender.send(bytes.len()).unwrap();
            bytes.iter().map(|&b| u64::from(b)).sum::<u64>()
        });
        assert_eq!((bytes, receiver.recv().unwrap()), (7 << 25, 32 << 20));
    }
}
