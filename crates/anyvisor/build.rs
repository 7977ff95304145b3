//! Compiles the first process of `exec`'s guests, a static program that the binary holds (`agent/agent.rs`).

use std::path::Path;
use std::process::Command;

fn main() {
    const SOURCE: &str = "agent/agent.rs";
    println!("cargo::rerun-if-changed={SOURCE}");
    let variable = |name| std::env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"));
    let out = Path::new(&variable("OUT_DIR")).join("agent");
    let mut rustc = Command::new(variable("RUSTC"));
    rustc.args(["--edition", "2024", "--crate-type", "bin", "--crate-name", "agent", "--target", &variable("TARGET")]);
    rustc.args(["-D", "warnings", "-D", "unsafe_op_in_unsafe_fn"]);
    for option in ["panic=abort", "opt-level=s", "relocation-model=static", "strip=symbols"] {
        rustc.args(["-C", option]);
    }
    // It has no C library, and begins at its own _start.
    for option in ["-nostartfiles", "-nostdlib", "-static", "-no-pie"] {
        rustc.arg("-C").arg(format!("link-arg={option}"));
    }
    if let Ok(linker) = std::env::var("RUSTC_LINKER") {
        rustc.arg("-C").arg(format!("linker={linker}"));
    }
    let status = rustc.arg("-o").arg(&out).arg(SOURCE).status();
    assert!(status.is_ok_and(|status| status.success()), "{SOURCE} does not compile");
}
