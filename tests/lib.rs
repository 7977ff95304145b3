//! Whole-VM tests: real guests through the real `anyvisor` binary.
