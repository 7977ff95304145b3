//! Running VMs from outside: where their control sockets are, and the commands that talk to them.
//!
//! | file | does |
//! |---|---|
//! | [`runtime`] | the runtime folder: names, locks, what dead VMs left |
//! | [`client`] | one request to a VM, or a console |
//! | [`commands`] | `ps`, `pause`, `resume`, `stop`, `snapshot` |
//! | [`console`] | `console` |
//! | [`balloon`] | `balloon` |
//! | [`devices`] | `device` |
//! | [`stat`] | `stat`, and the table of `run --stat` |

pub mod balloon;
pub mod client;
pub mod commands;
pub mod console;
pub mod devices;
pub mod runtime;
pub mod stat;
