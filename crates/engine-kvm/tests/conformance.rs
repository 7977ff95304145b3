//! The conformance suite on this host's KVM. Where the probe says that 64-bit kernel code does not run natively,
//! only what a page-table KVM can run. `cargo xtask test-nested` runs it on emulated VT-x and AMD-V.

use anyvisor_engine::conformance::{Bench, Outcome, cases, limits};
use anyvisor_engine_kvm::{Kvm, probe};
use std::time::Duration;

#[test]
fn all_that_this_host_can_run() {
    let engine = match Kvm::new() {
        Ok(engine) => engine,
        Err(error) => return println!("skipped: {error}"),
    };
    let (name, patience) = match probe(&engine) {
        Ok(()) => ("kvm", 30),
        Err(why) => {
            println!("only what a page-table KVM can run, because {why}");
            // Some cases are known to hang there.
            ("page-tables", 8)
        }
    };
    let host = limits::ALL.iter().find(|host| host.name == name).expect("the host's limits");
    let bench = Bench::new(&engine, Duration::from_secs(patience));
    let mut passed = 0;
    let mut failed = Vec::new();
    for case in cases().iter().filter(|case| limits::of(host, &case.name).is_none()) {
        match bench.run(case) {
            Outcome::Ok => passed += 1,
            Outcome::Skipped(_) => {}
            Outcome::Failed(why) => {
                let why = why.to_string();
                if limits::excuse(host, &case.name, &why).is_none() {
                    failed.push(format!("{}: {why}", case.name));
                }
            }
        }
    }
    println!("{passed} passed");
    assert!(failed.is_empty(), "{} cases failed:\n{}", failed.len(), failed.join("\n"));
    assert!(passed > 200, "{passed} passed");
}
