//! The 16550A serial port (National PC16550D data sheet).
//!
//! **Problem.** The console must be quick (a guest writes it a byte at a time) and must lose nothing: a
//! terminal paste of 64 KiB arrives faster than any guest reads.
//!
//! **Idea.** Pure state. The line is infinitely fast: a byte written is transmitted at once and returned
//! to the caller, so the transmitter is always empty. Input obeys back-pressure: [`Serial::enqueue`] takes
//! what fits into the 16-byte FIFO, and [`Serial::wants_input`] says once when a sender that did not get
//! everything in should come back. The interrupt is a level, [`Serial::interrupt`].
//!
//! The sender comes back only after the guest has seen the receiver empty (in LSR or IIR), not at once when
//! the last byte is read: the interrupt line must be seen low in between, or an edge-triggered input would
//! miss the next rise. A guest that has raised RTS once and drops it gets no input meanwhile (hardware flow
//! control).
//!
//! Unlike a slow line, a FIFO below its trigger level reports the character time-out at once.

use crate::state::{BadState, require};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// First of the eight ports of COM1, which is ISA IRQ 4.
pub const COM1_PORT: u16 = 0x3f8;
/// COM1's ISA interrupt.
pub const COM1_IRQ: u8 = 4;
/// Bytes the receiver holds with its FIFO on.
pub const FIFO_SIZE: usize = 16;

/// Register offsets.
mod reg {
    pub const DATA: u16 = 0;
    pub const IER: u16 = 1;
    /// IIR on reads, FCR on writes.
    pub const IIR: u16 = 2;
    pub const LCR: u16 = 3;
    pub const MCR: u16 = 4;
    pub const LSR: u16 = 5;
    pub const MSR: u16 = 6;
    pub const SCR: u16 = 7;
}

mod ier {
    pub const RECEIVE: u8 = 1 << 0;
    pub const TRANSMIT: u8 = 1 << 1;
    pub const LINE: u8 = 1 << 2;
    pub const MODEM: u8 = 1 << 3;
}

mod iir {
    pub const NONE: u8 = 0x01;
    pub const MODEM: u8 = 0x00;
    pub const TRANSMIT: u8 = 0x02;
    pub const RECEIVE: u8 = 0x04;
    pub const LINE: u8 = 0x06;
    pub const TIMEOUT: u8 = 0x0c;
    pub const FIFO_ON: u8 = 0xc0;
}

mod mcr {
    pub const RTS: u8 = 1 << 1;
    pub const OUT2: u8 = 1 << 3;
    pub const LOOP: u8 = 1 << 4;
}

mod lsr {
    pub const READY: u8 = 1 << 0;
    pub const OVERRUN: u8 = 1 << 1;
    pub const BREAK: u8 = 1 << 4;
    /// Holding register and shift register empty.
    pub const TRANSMITTER_EMPTY: u8 = 0x60;
}

const DLAB: u8 = 0x80;
const FCR_ENABLE: u8 = 0x01;
const FCR_CLEAR_RECEIVER: u8 = 0x02;

/// DCD, DSR and CTS: a terminal is there and ready.
const MODEM_READY: u8 = 0xb0;

/// One serial port.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    received: VecDeque<u8>,
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    /// Overrun and break, until LSR is read.
    line_errors: u8,
    /// Modem lines, and their changes since MSR was read.
    modem: u8,
    modem_changes: u8,
    scratch: u8,
    divisor: u16,
    /// The transmitter became empty, and neither IIR nor a new byte has dealt with that.
    transmit_pending: bool,
    /// A sender had more than fitted.
    sender_waits: bool,
    /// The guest has seen the receiver empty since the last input.
    seen_empty: bool,
    /// The guest has raised RTS, so it uses it.
    rts_used: bool,
}

impl Default for Serial {
    fn default() -> Serial {
        Serial::new()
    }
}

impl Serial {
    /// After reset, at 9600 baud.
    pub fn new() -> Serial {
        Serial {
            received: VecDeque::with_capacity(FIFO_SIZE),
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            line_errors: 0,
            modem: MODEM_READY,
            modem_changes: 0,
            scratch: 0,
            divisor: 12,
            transmit_pending: false,
            sender_waits: false,
            seen_empty: true,
            rts_used: false,
        }
    }

    /// Refuses a restored state that no guest can reach.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), BadState> {
        require(
            "serial port",
            &[
                (self.received.len() <= self.capacity(), "more bytes received than the FIFO holds"),
                (self.ier & !0xf == 0, "undefined bits in IER"),
                (self.fcr == 0 || self.fcr & !0xc8 == FCR_ENABLE, "undefined bits in FCR"),
                (self.mcr & !0x1f == 0, "undefined bits in MCR"),
                (self.line_errors & !(lsr::OVERRUN | lsr::BREAK) == 0, "undefined line errors"),
                (self.modem & 0xf == 0 && self.modem_changes & !0xf == 0, "undefined modem lines"),
            ],
        )
    }

    /// Takes as many of `bytes` from the line as fit, and says how many. If not all did,
    /// [`Serial::wants_input`] will become true.
    #[must_use]
    pub fn enqueue(&mut self, bytes: &[u8]) -> usize {
        let taken = self.room().min(bytes.len());
        self.received.extend(&bytes[..taken]);
        self.sender_waits = taken < bytes.len();
        if taken > 0 {
            self.seen_empty = false;
        }
        taken
    }

    /// How many bytes [`Serial::enqueue`] would take now.
    pub fn room(&self) -> usize {
        // In loopback the receiver is disconnected from the line.
        let stopped = self.mcr & mcr::LOOP != 0 || self.rts_used && self.mcr & mcr::RTS == 0;
        if stopped { 0 } else { self.capacity() - self.received.len() }
    }

    /// True once after a sender was cut short and the guest is ready for more. Ask after accesses.
    pub fn wants_input(&mut self) -> bool {
        let idle = self.seen_empty || self.ier & ier::RECEIVE == 0;
        let wants = self.sender_waits && idle && self.received.is_empty() && self.room() > 0;
        if wants {
            self.sender_waits = false;
        }
        wants
    }

    /// A break condition on the line (Linux' SysRq on a serial console).
    pub fn receive_break(&mut self) {
        self.receive(0);
        self.line_errors |= lsr::BREAK;
    }

    /// The level of the interrupt line. On a PC the OUT2 output gates it.
    pub fn interrupt(&self) -> bool {
        self.mcr & (mcr::OUT2 | mcr::LOOP) == mcr::OUT2 && self.cause() != iir::NONE
    }

    /// Reads the register at `offset` (0–7) from the port's base.
    pub fn read(&mut self, offset: u16) -> u8 {
        match offset {
            reg::DATA if self.lcr & DLAB != 0 => self.divisor as u8,
            reg::IER if self.lcr & DLAB != 0 => (self.divisor >> 8) as u8,
            reg::DATA => self.received.pop_front().unwrap_or(0),
            reg::IER => self.ier,
            reg::IIR => {
                let cause = self.cause();
                match cause {
                    iir::TRANSMIT => self.transmit_pending = false,
                    iir::NONE => self.seen_empty = true,
                    _ => {}
                }
                cause | if self.fifo_on() { iir::FIFO_ON } else { 0 }
            }
            reg::LCR => self.lcr,
            reg::MCR => self.mcr,
            reg::LSR => {
                let ready = if self.received.is_empty() { 0 } else { lsr::READY };
                self.seen_empty |= ready == 0;
                lsr::TRANSMITTER_EMPTY | ready | std::mem::take(&mut self.line_errors)
            }
            reg::MSR => self.modem | std::mem::take(&mut self.modem_changes),
            reg::SCR => self.scratch,
            _ => 0xff,
        }
    }

    /// Writes the register at `offset` (0–7); returns the byte this sends down the line, if any.
    pub fn write(&mut self, offset: u16, value: u8) -> Option<u8> {
        match offset {
            reg::DATA if self.lcr & DLAB != 0 => self.divisor = self.divisor & 0xff00 | u16::from(value),
            reg::IER if self.lcr & DLAB != 0 => self.divisor = self.divisor & 0xff | u16::from(value) << 8,
            reg::DATA => return self.transmit(value),
            reg::IER => {
                let value = value & 0xf;
                // Enabling the interrupt with the transmitter empty raises it (Linux relies on this).
                if value & !self.ier & ier::TRANSMIT != 0 {
                    self.transmit_pending = true;
                }
                self.ier = value;
            }
            reg::IIR => self.write_fcr(value),
            reg::LCR => self.lcr = value,
            reg::MCR => self.write_mcr(value & 0x1f),
            reg::SCR => self.scratch = value,
            _ => {}
        }
        None
    }

    fn transmit(&mut self, value: u8) -> Option<u8> {
        self.transmit_pending = true;
        if self.mcr & mcr::LOOP == 0 {
            return Some(value);
        }
        self.receive(value);
        None
    }

    fn receive(&mut self, value: u8) {
        if self.received.len() < self.capacity() {
            self.received.push_back(value);
            return;
        }
        self.line_errors |= lsr::OVERRUN;
        if !self.fifo_on() {
            // Without FIFO the new byte overwrites the old one.
            self.received.clear();
            self.received.push_back(value);
        }
    }

    fn write_fcr(&mut self, value: u8) {
        // A change of the enable bit clears the FIFOs, and without it the other bits are not programmed.
        if (value ^ self.fcr) & FCR_ENABLE != 0 || value & FCR_CLEAR_RECEIVER != 0 {
            self.received.clear();
            self.seen_empty = true;
        }
        self.fcr = if value & FCR_ENABLE != 0 { value & 0xc9 } else { 0 };
    }

    fn write_mcr(&mut self, value: u8) {
        self.mcr = value;
        self.rts_used |= value & (mcr::RTS | mcr::LOOP) == mcr::RTS;
        let modem = if value & mcr::LOOP != 0 {
            // RTS, DTR, OUT1 and OUT2 come back as CTS, DSR, RI and DCD.
            (value & 2) << 3 | (value & 1) << 5 | (value & 4) << 4 | (value & 8) << 4
        } else {
            MODEM_READY
        };
        let changed = (modem ^ self.modem) >> 4;
        // For RI only the trailing edge counts.
        let ring = if self.modem & !modem & 0x40 != 0 { 4 } else { 0 };
        self.modem_changes |= changed & 0xb | ring;
        self.modem = modem;
    }

    /// The interrupt of highest priority, as IIR shows it.
    fn cause(&self) -> u8 {
        if self.ier & ier::LINE != 0 && self.line_errors != 0 {
            iir::LINE
        } else if self.ier & ier::RECEIVE != 0 && !self.received.is_empty() {
            if self.received.len() >= self.trigger_level() { iir::RECEIVE } else { iir::TIMEOUT }
        } else if self.ier & ier::TRANSMIT != 0 && self.transmit_pending {
            iir::TRANSMIT
        } else if self.ier & ier::MODEM != 0 && self.modem_changes != 0 {
            iir::MODEM
        } else {
            iir::NONE
        }
    }

    fn fifo_on(&self) -> bool {
        self.fcr & FCR_ENABLE != 0
    }

    fn capacity(&self) -> usize {
        if self.fifo_on() { FIFO_SIZE } else { 1 }
    }

    fn trigger_level(&self) -> usize {
        if self.fifo_on() { [1, 4, 8, 14][usize::from(self.fcr >> 6)] } else { 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Linux' 8250 driver opens a port: FIFO with trigger level 8, receive and line interrupts, OUT2.
    fn opened() -> Serial {
        let mut port = Serial::new();
        for (offset, value) in [(2, 0x01), (2, 0x07), (2, 0x00), (3, 0x03), (4, 0x0b), (1, 0x05), (2, 0x81)] {
            assert_eq!(port.write(offset, value), None);
        }
        port
    }

    #[test]
    fn linux_identifies_a_16550a() {
        // drivers/tty/serial/8250/8250_port.c autoconfig().
        let mut port = Serial::new();
        assert_eq!(port.write(1, 0), None);
        assert_eq!(port.read(1) & 0xf, 0);
        assert_eq!(port.write(1, 0xff), None);
        assert_eq!(port.read(1), 0xf, "no bits above 3");
        assert_eq!(port.write(1, 0), None);
        assert_eq!(port.write(4, 0x1a), None);
        assert_eq!(port.read(6) & 0xf0, 0x90, "loopback of RTS and OUT2");
        assert_eq!(port.write(4, 0), None);
        assert_eq!(port.write(2, 1), None);
        assert_eq!(port.read(2) >> 6, 3);
        // No EFR: IIR answers at its place with LCR 0xbf.
        assert_eq!(port.write(3, 0xbf), None);
        assert_ne!(port.read(2), 0);
        // No 64-byte FIFO of a 16750.
        assert_eq!(port.write(2, 0x21), None);
        assert_eq!(port.read(2) >> 5, 6);
        assert_eq!(port.write(3, 0), None);
        for value in [0x55, 0xaa] {
            assert_eq!(port.write(7, value), None);
            assert_eq!(port.read(7), value);
        }
    }

    #[test]
    fn the_divisor_is_behind_dlab() {
        let mut port = Serial::new();
        for (offset, value) in [(3, 0x83), (0, 0x01), (1, 0x02)] {
            assert_eq!(port.write(offset, value), None);
        }
        assert_eq!((port.read(0), port.read(1)), (1, 2));
        assert_eq!(port.write(3, 0x03), None);
        assert_eq!((port.read(0), port.read(1), port.read(3)), (0, 0, 3));
        assert_eq!(port.write(0, b'x'), Some(b'x'));
    }

    #[test]
    fn transmit_interrupts() {
        let mut port = opened();
        assert!(!port.interrupt());
        // Linux' THRE test: enabling raises, reading IIR clears, enabling again raises again.
        assert_eq!(port.write(1, 0x02), None);
        assert!(port.interrupt());
        assert_eq!(port.read(2), 0xc2);
        assert!(!port.interrupt());
        assert_eq!(port.read(2), 0xc1);
        assert_eq!(port.write(1, 0), None);
        assert_eq!(port.write(1, 0x02), None);
        assert_eq!(port.read(2), 0xc2);
        assert_eq!(port.write(0, b'a'), Some(b'a'));
        assert!(port.interrupt());
        assert_eq!(port.read(5), 0x60);
        assert!(port.interrupt(), "reading LSR does not clear it");
        assert_eq!(port.write(1, 0), None);
        assert!(!port.interrupt());
    }

    #[test]
    fn receive_interrupts_and_their_priority() {
        let mut port = opened();
        assert_eq!(port.write(1, 0x0f), None);
        assert_eq!(port.enqueue(b"1234567"), 7);
        assert!(port.interrupt());
        assert_eq!(port.read(2), 0xcc, "below the trigger level");
        assert_eq!(port.enqueue(b"8"), 1);
        assert_eq!(port.read(2), 0xc4);
        port.receive_break();
        assert_eq!(port.read(2), 0xc6);
        assert_eq!(port.read(5), 0x71);
        assert_eq!(port.read(5), 0x61, "reading clears the break");
        for expected in b"12345678\0" {
            assert!(port.interrupt());
            assert_eq!(port.read(0), *expected);
        }
        assert_eq!(port.read(2), 0xc2, "and last the transmitter");
        assert!(!port.interrupt());
    }

    #[test]
    fn interrupts_need_out2_and_no_loop() {
        for (mcr, expected) in [(0x08, true), (0x0b, true), (0x00, false), (0x18, false)] {
            let mut port = opened();
            assert_eq!(port.enqueue(b"x"), 1);
            assert_eq!(port.write(4, mcr), None);
            assert_eq!(port.interrupt(), expected, "MCR {mcr:#x}");
        }
    }

    #[test]
    fn loopback_returns_data_and_modem_lines() {
        let mut port = opened();
        port.read(6);
        // MCR, MSR it gives.
        for (mcr, msr) in [(0x10, 0x0b), (0x11, 0x22), (0x12, 0x13), (0x14, 0x41), (0x18, 0x8c)] {
            assert_eq!(port.write(4, mcr), None);
            assert_eq!(port.read(6), msr, "MCR {mcr:#x}");
        }
        assert_eq!(port.write(0, b'q'), None);
        assert_eq!(port.enqueue(b"line"), 0, "the line is cut off");
        assert_eq!(port.read(5) & 1, 1);
        assert_eq!(port.read(0), b'q');
        for _ in 0..=FIFO_SIZE {
            assert_eq!(port.write(0, 1), None);
        }
        assert_eq!(port.read(5) & 2, 2, "overrun");
        assert_eq!(port.write(4, 0x0b), None);
        assert_eq!(port.read(0), 1);
    }

    /// Linux' serial8250_interrupt: passes until IIR shows nothing, each reading while LSR says ready.
    fn linux_handler(port: &mut Serial, got: &mut Vec<u8>, mut after_access: impl FnMut(&mut Serial)) {
        // It gives up after so many, to come back with the next edge.
        for _pass in 0..512 {
            let cause = port.read(2);
            after_access(port);
            if cause & 1 != 0 {
                return;
            }
            while port.read(5) & 1 != 0 {
                after_access(port);
                got.push(port.read(0));
                after_access(port);
            }
            after_access(port);
        }
    }

    #[test]
    fn a_long_paste_arrives_whole_by_edges() {
        let mut port = opened();
        let paste: Vec<u8> = (0..65_536u32).map(|i| (i * 7 % 251) as u8).collect();
        let mut sent = port.enqueue(&paste);
        assert_eq!((sent, port.room()), (FIFO_SIZE, 0));
        let mut got = Vec::new();
        // An edge-triggered input remembers a rise of the line during the handler.
        let (mut line, mut edge) = (true, true);
        while std::mem::take(&mut edge) {
            linux_handler(&mut port, &mut got, |port| {
                if port.wants_input() {
                    assert!(!port.wants_input(), "said once");
                    sent += port.enqueue(&paste[sent..]);
                }
                edge |= port.interrupt() && !line;
                line = port.interrupt();
            });
        }
        assert_eq!(got, paste);
    }

    #[test]
    fn a_polling_guest_gets_its_input_too() {
        for ier in [0, 1] {
            let mut port = opened();
            assert_eq!(port.write(1, ier), None);
            let mut sent = port.enqueue(&[9; 100]);
            let mut got = 0;
            for _ in 0..1000 {
                if port.read(5) & 1 != 0 {
                    port.read(0);
                    got += 1;
                }
                if port.wants_input() {
                    sent += port.enqueue(&[9; 100][sent..]);
                }
            }
            assert_eq!(got, 100, "IER {ier}");
        }
    }

    #[test]
    fn rts_holds_the_sender() {
        let mut port = Serial::new();
        assert_eq!(port.room(), 1, "a guest that never raises it gets input");
        assert_eq!(port.write(4, 0x02), None);
        assert_eq!(port.room(), 1);
        assert_eq!(port.write(4, 0x01), None);
        assert_eq!(port.enqueue(b"x"), 0);
        assert!(!port.wants_input());
        assert_eq!(port.write(4, 0x0b), None);
        assert!(port.wants_input());
        assert_eq!(port.enqueue(b"x"), 1);
    }

    #[test]
    fn without_fifo_there_is_one_byte() {
        let mut port = Serial::new();
        assert_eq!(port.write(4, 8), None);
        assert_eq!(port.write(1, 1), None);
        assert_eq!(port.enqueue(b"ab"), 1);
        assert_eq!(port.read(2), 0x04);
        assert!(!port.wants_input());
        assert_eq!(port.read(0), b'a');
        assert!(!port.wants_input(), "the line must be seen low first");
        assert_eq!(port.read(2), 0x01);
        assert!(port.wants_input());
        assert_eq!(port.enqueue(b"b"), 1);
        assert_eq!(port.write(2, 1), None);
        assert_eq!(port.read(5) & 1, 0, "switching the FIFO on clears it");
        assert_eq!(port.enqueue(b"cd"), 2);
        assert_eq!(port.write(2, 3), None);
        assert_eq!(port.read(5) & 1, 0, "and so does the clear bit");
    }

    #[test]
    fn clearing_the_fifo_calls_the_waiting_sender() {
        let mut port = opened();
        assert_eq!(port.enqueue(&[1; 20]), 16);
        assert_eq!(port.write(2, 0x83), None);
        assert!(port.wants_input());
    }
}
