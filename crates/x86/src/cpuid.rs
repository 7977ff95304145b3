//! CPUID tables and the named CPU models.

use serde::{Deserialize, Serialize};

/// What CPUID returns for one leaf and subleaf.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidResult {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// One entry of a [`Cpuid`] table. A leaf without subleaves has `subleaf: None` and answers for any ECX.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidLeaf {
    pub leaf: u32,
    pub subleaf: Option<u32>,
    pub result: CpuidResult,
}

/// A table of leaves: what a host supports, or what a vCPU shows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpuid {
    pub leaves: Vec<CpuidLeaf>,
}

impl Cpuid {
    /// The exact entry for `leaf` and `subleaf`, if the table has one.
    pub fn get(&self, leaf: u32, subleaf: u32) -> Option<CpuidResult> {
        self.leaves.iter().find(|l| l.leaf == leaf && l.subleaf.is_none_or(|s| s == subleaf)).map(|l| l.result)
    }

    /// Adds or replaces an entry.
    pub fn set(&mut self, leaf: u32, subleaf: Option<u32>, result: CpuidResult) {
        match self.leaves.iter_mut().find(|l| l.leaf == leaf && l.subleaf == subleaf) {
            Some(entry) => entry.result = result,
            None => self.leaves.push(CpuidLeaf { leaf, subleaf, result }),
        }
    }
}
