//! `cargo xtask network`: how fast bytes go between a guest and its host through the rootless network, and through QEMU's.
//!
//! A server on this host is sent and sends so many bytes by a C program in the guest (bench/transfer.c). Each VM moves them in both
//! directions; VMs of both kinds take turns. Times are the host's, from the connection to the receiver's word that it has all.

use crate::install_qemu;
use anyhow::{Context, Result, ensure};
use anyvisor_tests::{assets, vm};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const MEMORY: &str = "512M";
/// What Linux needs to have virtio network cards, in the order of loading.
const MODULES: [&str; 8] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "failover",
    "net_failover",
    "virtio_net",
];
const COMMAND_LINE: &str = "console=ttyS0 quiet";
/// How long a VM may take to connect.
const PATIENCE: Duration = Duration::from_secs(600);

#[derive(clap::Args)]
pub struct Options {
    /// MiB to move each way
    #[arg(long, default_value_t = 1024)]
    size: u64,
    /// VMs of each kind
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    runs: u64,
    /// Do not run QEMU
    #[arg(long)]
    no_qemu: bool,
    /// What anyvisor's guest is connected to: for experiments
    #[arg(long, default_value = "user")]
    net: String,
}

/// Seconds to send and to receive, as the guest sees it.
type Times = [f64; 2];

/// Measures, and prints what came of it.
///
/// # Errors
/// A guest does not boot, or bytes get lost.
pub fn network(options: &Options) -> Result<()> {
    if !options.no_qemu {
        install_qemu()?;
    }
    let server = TcpListener::bind("127.0.0.1:0")?;
    server.set_nonblocking(true)?;
    let initramfs = assets::scratch("transfer.cpio", &initramfs(server.local_addr()?.port(), options.size << 20)?)?;
    let (mut ours, mut qemus) = (Vec::new(), Vec::new());
    for run in 1..=options.runs {
        ours.push(measure("anyvisor", anyvisor(&initramfs, options)?, &server, options, run)?);
        if !options.no_qemu {
            qemus.push(measure("QEMU", qemu(&initramfs)?, &server, options, run)?);
        }
    }
    std::fs::remove_file(initramfs)?;
    for (n, direction) in ["guest to host", "host to guest"].into_iter().enumerate() {
        let ours = median(ours.iter().map(|times| times[n]).collect());
        let speed = |seconds: f64| options.size as f64 / seconds;
        print!("{direction}: anyvisor {:.0} MiB/s", speed(ours));
        if options.no_qemu {
            println!();
            continue;
        }
        let qemu = median(qemus.iter().map(|times| times[n]).collect());
        println!(", QEMU TCG {:.0} MiB/s: {:.1} times as fast", speed(qemu), qemu / ours);
    }
    Ok(())
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    let middle = times.len() / 2;
    if times.len().is_multiple_of(2) { (times[middle - 1] + times[middle]) / 2.0 } else { times[middle] }
}

fn initramfs(port: u16, bytes: u64) -> Result<Vec<u8>> {
    let mut files = assets::modules(&MODULES)?;
    files.push(("bin/transfer".to_owned(), std::fs::read(assets::transfer()?)?));
    let script = format!(
        "for m in {}; do [ -e /$m.ko ] && insmod /$m.ko; done
         ip link set eth0 up; ip addr add 10.0.2.15/24 dev eth0
         transfer send 10.0.2.2 {port} {bytes} && transfer receive 10.0.2.2 {port} {bytes}
         poweroff -f",
        MODULES.join(" ")
    );
    assets::initramfs_with(&script, &files)
}

fn anyvisor(initramfs: &Path, options: &Options) -> Result<Command> {
    let initramfs = initramfs.display().to_string();
    let machine = ["--engine", "translator", "--cpu-model", "host", "--memory", MEMORY, "--net", &options.net];
    let boot = ["--initrd", &initramfs, "--cmdline", COMMAND_LINE];
    let mut command = vm::command();
    command.args(vm::arguments(&assets::kernel()?, &[&machine[..], &boot].concat()));
    Ok(command)
}

fn qemu(initramfs: &Path) -> Result<Command> {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", "tcg", "-cpu", "max", "-m", MEMORY, "-no-reboot", "-nodefaults", "-display", "none"]);
    command.args(["-serial", "stdio", "-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n"]);
    command.args(["-append", COMMAND_LINE]).arg("-kernel").arg(assets::kernel()?).arg("-initrd").arg(initramfs);
    Ok(command)
}

/// Runs one VM.
fn measure(name: &str, mut command: Command, server: &TcpListener, options: &Options, run: u64) -> Result<Times> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("starting {name}"))?;
    let times = serve(server, options.size << 20, &mut child);
    // It powers off by itself, unless something went wrong.
    if times.is_err() {
        let _ = child.kill();
    }
    child.wait()?;
    let times = times.with_context(|| format!("the guest in {name}"))?;
    let [sent, received] = times.map(|seconds| options.size as f64 / seconds);
    eprintln!("xtask: {name}, run {run}: {sent:.0} MiB/s to the host, {received:.0} MiB/s from it");
    Ok(times)
}

/// Is sent, and then sends, so many bytes.
fn serve(server: &TcpListener, bytes: u64, child: &mut Child) -> Result<Times> {
    let mut buffer = vec![b'x'; 1 << 20];
    let mut stream = accept(server, child)?;
    let began = Instant::now();
    let mut got = 0;
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            count => got += count as u64,
        }
    }
    ensure!(got == bytes, "{got} bytes came of {bytes}");
    stream.write_all(b"x")?;
    let sent = began.elapsed().as_secs_f64();
    let mut stream = accept(server, child)?;
    let began = Instant::now();
    let mut left = bytes;
    while left > 0 {
        let part = left.min(buffer.len() as u64);
        stream.write_all(&buffer[..part as usize])?;
        left -= part;
    }
    stream.read_exact(&mut [0])?;
    Ok([sent, began.elapsed().as_secs_f64()])
}

fn accept(server: &TcpListener, child: &mut Child) -> Result<std::net::TcpStream> {
    let began = Instant::now();
    loop {
        match server.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        ensure!(child.try_wait()?.is_none() && began.elapsed() < PATIENCE, "does not connect");
        std::thread::sleep(Duration::from_millis(2));
    }
}
