//! Makes a case that differs as small as it goes: fewer instructions, fewer bytes poked, a plainer state.

use crate::bench::{Bench, Finding};
use crate::case::{Case, State, X87};
use crate::layout::bits_at;
use anyvisor_engine_translator::vendor;

/// How often a finding is gone over to make it smaller, at most.
const MINIMISER_PASSES: usize = 16;

/// Makes a finding's case smaller for as long as its executor still differs from the host.
pub fn minimise(bench: &mut Bench, finding: Finding) -> Finding {
    let mut best = finding;
    // A difference that comes and goes could make each pass end elsewhere.
    for _ in 0..MINIMISER_PASSES {
        let before = best.case.clone();
        for smaller in smaller_codes(&best.case) {
            keep_if_different(bench, &mut best, smaller);
        }
        let pokes = best.case.pokes.len();
        for i in (0..pokes).rev() {
            let mut smaller = best.case.clone();
            smaller.pokes.remove(i);
            keep_if_different(bench, &mut best, smaller);
        }
        for change in state_changes() {
            let mut smaller = best.case.clone();
            change(&mut smaller.state);
            keep_if_different(bench, &mut best, smaller);
        }
        if best.case == before {
            break;
        }
    }
    best
}

fn keep_if_different(bench: &mut Bench, best: &mut Finding, case: Case) -> bool {
    if case == best.case || case.code.is_empty() {
        return false;
    }
    let executor = best.executor;
    match bench.check(&case).finding() {
        Some(finding) if finding.executor == executor => {
            *best = finding;
            true
        }
        _ => false,
    }
}
/// The case without each one of its instructions.
fn smaller_codes(case: &Case) -> Vec<Case> {
    let mut decoder = vendor::decoder(bits_at(case.state.rip), &case.code, case.state.rip);
    let mut pieces = Vec::new();
    while decoder.can_decode() {
        let start = decoder.position();
        let _ = decoder.decode();
        pieces.push(start..decoder.position());
    }
    if pieces.len() < 2 {
        return Vec::new();
    }
    pieces
        .into_iter()
        .rev()
        .map(|piece| {
            let mut smaller = case.clone();
            smaller.code.drain(piece);
            smaller
        })
        .collect()
}

type Change = Box<dyn Fn(&mut State)>;

fn state_changes() -> Vec<Change> {
    let mut changes: Vec<Change> = vec![
        Box::new(|s| s.ymm = [[0; 32]; 16]),
        Box::new(|s| s.x87 = X87::default()),
        Box::new(|s| s.x87.st = [[0; 10]; 8]),
        Box::new(|s| s.x87.tag = 0xff),
        Box::new(|s| s.x87.status = 0),
        Box::new(|s| s.mxcsr = 0x1f80),
        Box::new(|s| s.rflags &= 0x602),
        Box::new(|s| s.rflags &= !0x400),
        Box::new(|s| s.fs_base = 0),
        Box::new(|s| s.gs_base = 0),
    ];
    for i in 0..16 {
        changes.push(Box::new(move |s| s.gpr[i] = 0));
        changes.push(Box::new(move |s| s.ymm[i] = [0; 32]));
    }
    for i in 0..8 {
        changes.push(Box::new(move |s| s.x87.st[i] = [0; 10]));
    }
    changes
}
