//! The 8254 programmable interval timer and port 0x61 (Intel 8254 data sheet; PIIX4 for port 0x61).
//!
//! **Idea.** No counter ever counts: each channel remembers the tick at which its count was loaded, and
//! OUT, the count and the next edge are functions of the tick of an access. Ticks are guest nanoseconds
//! times 1.193182 MHz.
//!
//! Channel 0's OUT is ISA IRQ 0: call [`Pit::poll`] after every access and whenever [`Pit::next_event`] is
//! due, and pass on the edge it reports. Edges missed between two polls merge into one.
//!
//! Simplification: a count written in modes 2 and 3 takes effect at the end of the period (the data sheet
//! says of the half-period in mode 3), and counts are loaded at once instead of at the next tick.

use crate::state::{BadState, LATEST, require};
use serde::{Deserialize, Serialize};

/// The input frequency in Hz: a third of the NTSC colour subcarrier.
pub const FREQUENCY: u64 = 1_193_182;

/// First of the four ports (three counters, control word).
pub const PORT: u16 = 0x40;
/// System control port B: gate and speaker.
pub const PORT_B: u16 = 0x61;

/// Channel 0's output since the last poll.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Out0 {
    /// OUT rose at least once: lower IRQ 0 and raise it.
    pub edge: bool,
    /// OUT now; set IRQ 0 to this after an edge.
    pub level: bool,
}

fn ticks(now_ns: u64) -> u64 {
    (u128::from(now_ns) * u128::from(FREQUENCY) / 1_000_000_000) as u64
}

/// The first nanosecond of a tick.
fn nanoseconds(tick: u64) -> u64 {
    (u128::from(tick) * 1_000_000_000).div_ceil(u128::from(FREQUENCY)) as u64
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Access {
    Low,
    High,
    Both,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Channel {
    /// 0–5.
    mode: u8,
    bcd: bool,
    access: Access,
    gate: bool,
    /// The count in use, 1–0x10000; 0 before the first one after a control word.
    count: u32,
    /// A count that replaces it at a tick, the end of the period.
    next: Option<(u32, u64)>,
    /// Tick of loading; `None` while modes 1 and 5 wait for their trigger, or no count is there.
    start: Option<u64>,
    /// Ticks already counted when the gate stopped the channel.
    held: Option<u64>,
    /// OUT rose since the last poll.
    edge: bool,
    /// Tick up to which edges are in `edge`.
    seen: u64,
    /// Low byte of a two-byte write.
    low: Option<u8>,
    /// The next read of an unlatched two-byte count gets the high byte.
    read_high: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
}

impl Channel {
    fn new(gate: bool) -> Channel {
        Channel {
            mode: 0,
            bcd: false,
            access: Access::Both,
            gate,
            count: 0,
            next: None,
            start: None,
            held: None,
            edge: false,
            seen: 0,
            low: None,
            read_high: false,
            latched_count: None,
            latched_status: None,
        }
    }

    /// What [`Pit::check`] does, for a chip that is saved at `tick`.
    fn check(&self, tick: u64) -> Result<(), BadState> {
        // Digits that are not decimal make more than four nines, but never more than 16 bits.
        let largest = 0x1_0000;
        let started = self.start.is_some();
        let next = self.next.is_none_or(|(count, at)| {
            let waits_for_trigger = matches!(self.mode, 1 | 5) && at == u64::MAX;
            (1..=largest).contains(&count) && (waits_for_trigger || self.is_periodic() && at <= tick + (1 << 17))
        });
        require(
            "PIT",
            &[
                (self.mode <= 5, "no such mode"),
                (self.count <= largest, "a count beyond 16 bits"),
                (!started || self.count != 0, "it counts without a count"),
                (next, "an impossible next count"),
                (self.start.is_none_or(|start| start <= tick), "it was loaded in the future"),
                (self.held.is_none_or(|held| held <= tick), "it was stopped in the future"),
                (self.seen <= tick, "it was seen in the future"),
            ],
        )
    }

    fn is_periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    /// Ticks counted since the count was loaded.
    fn elapsed(&self, tick: u64) -> Option<u64> {
        let start = self.start?;
        Some(self.held.unwrap_or(tick.saturating_sub(start)))
    }

    fn out(&self, tick: u64) -> bool {
        let count = u64::from(self.count);
        let Some(elapsed) = self.elapsed(tick) else { return self.mode != 0 };
        match self.mode {
            0 | 1 => elapsed >= count,
            // The gate holds OUT high.
            2 | 3 if self.held.is_some() => true,
            2 => elapsed % count != count - 1,
            3 => elapsed % count < count.div_ceil(2),
            _ => elapsed != count,
        }
    }

    /// The first tick after `tick` at which OUT rises.
    fn next_edge(&self, tick: u64) -> Option<u64> {
        let start = self.start?;
        if self.held.is_some() {
            return None;
        }
        let count = u64::from(self.count);
        match self.mode {
            0 | 1 => Some(start + count).filter(|&at| at > tick),
            // A period of one tick never leaves its level.
            2 | 3 if count == 1 => None,
            2 | 3 => {
                let periods = tick.checked_sub(start).map_or(1, |elapsed| elapsed / count + 1);
                Some(start + periods * count)
            }
            _ => Some(start + count + 1).filter(|&at| at > tick),
        }
    }

    /// Brings edges and a waiting count up to `tick`.
    fn advance(&mut self, tick: u64) {
        if let Some((count, at)) = self.next
            && tick >= at
        {
            self.note_edges(at);
            self.count = count;
            self.start = Some(at);
            self.next = None;
        }
        self.note_edges(tick);
    }

    fn note_edges(&mut self, until: u64) {
        self.edge |= self.next_edge(self.seen).is_some_and(|at| at <= until);
        self.seen = self.seen.max(until);
    }

    /// Applies a change at `tick`, noting an edge that it makes itself.
    fn change(&mut self, tick: u64, change: impl FnOnce(&mut Channel)) {
        self.advance(tick);
        let before = self.out(tick);
        change(self);
        self.edge |= !before && self.out(tick);
    }

    fn control(&mut self, value: u8, tick: u64) {
        self.change(tick, |channel| {
            channel.mode = match value >> 1 & 7 {
                mode @ 6..=7 => mode - 4,
                mode => mode,
            };
            channel.bcd = value & 1 != 0;
            channel.access = match value >> 4 & 3 {
                1 => Access::Low,
                2 => Access::High,
                _ => Access::Both,
            };
            channel.count = 0;
            channel.next = None;
            channel.start = None;
            channel.held = None;
            channel.low = None;
            channel.read_high = false;
            channel.latched_count = None;
            channel.latched_status = None;
        });
    }

    fn write(&mut self, value: u8, tick: u64) {
        let raw = match (self.access, self.low.take()) {
            (Access::Low, _) => u16::from(value),
            (Access::High, _) => u16::from(value) << 8,
            (Access::Both, Some(low)) => u16::from_le_bytes([low, value]),
            (Access::Both, None) => {
                self.low = Some(value);
                if self.mode == 0 {
                    // The first byte stops the count and drops OUT.
                    self.change(tick, |channel| channel.start = None);
                }
                return;
            }
        };
        let count = match (raw, self.bcd) {
            (0, false) => 0x1_0000,
            (0, true) => 10_000,
            (raw, false) => raw.into(),
            (raw, true) => from_bcd(raw),
        };
        self.change(tick, |channel| channel.load(count, tick));
    }

    fn load(&mut self, count: u32, tick: u64) {
        match (self.mode, self.start) {
            (2 | 3, Some(start)) if self.held.is_none() => {
                let period = u64::from(self.count);
                let at = start + (tick.saturating_sub(start) / period + 1) * period;
                self.next = Some((count, at));
            }
            // Hardware-triggered modes take it at the next trigger; a running one-shot is not disturbed.
            (1 | 5, Some(_)) => self.next = Some((count, u64::MAX)),
            (1 | 5, None) => self.count = count,
            _ => {
                self.count = count;
                self.start = Some(tick);
                self.held = if self.gate { None } else { Some(0) };
            }
        }
    }

    fn set_gate(&mut self, gate: bool, tick: u64) {
        if gate == self.gate {
            return;
        }
        self.change(tick, |channel| {
            channel.gate = gate;
            match (channel.mode, gate) {
                (1 | 5, true) => {
                    if let Some((count, _)) = channel.next.take() {
                        channel.count = count;
                    }
                    channel.start = (channel.count != 0).then_some(tick);
                }
                (1 | 5, false) => {}
                (_, false) => channel.held = channel.elapsed(tick),
                (2 | 3, true) => {
                    if let Some((count, _)) = channel.next.take() {
                        channel.count = count;
                    }
                    channel.start = channel.start.map(|_| tick);
                    channel.held = None;
                }
                (_, true) => {
                    if let Some(held) = channel.held.take() {
                        channel.start = Some(tick.saturating_sub(held));
                    }
                }
            }
        });
    }

    /// The counting element's contents.
    fn value(&self, tick: u64) -> u16 {
        let modulus: u64 = if self.bcd { 10_000 } else { 0x1_0000 };
        let count = u64::from(self.count);
        let value = match (self.elapsed(tick), self.mode) {
            (None, _) => count,
            (Some(elapsed), 2) => count - elapsed % count,
            // Counts down by twos, twice in each period.
            (Some(elapsed), 3) => (count - 2 * (elapsed % count) % count) & !1,
            (Some(elapsed), _) => (count + modulus - elapsed % modulus) % modulus,
        } % modulus;
        if self.bcd { to_bcd(value as u32) } else { value as u16 }
    }

    fn status(&self, tick: u64) -> u8 {
        let null = self.count == 0 || self.next.is_some();
        let access = match self.access {
            Access::Low => 1,
            Access::High => 2,
            Access::Both => 3,
        };
        u8::from(self.out(tick)) << 7 | u8::from(null) << 6 | access << 4 | self.mode << 1 | u8::from(self.bcd)
    }

    fn latch_count(&mut self, tick: u64) {
        if self.latched_count.is_none() {
            self.latched_count = Some(self.value(tick));
            self.read_high = false;
        }
    }

    fn read(&mut self, tick: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self.latched_count.unwrap_or_else(|| self.value(tick)).to_le_bytes();
        let (byte, last) = match self.access {
            Access::Low => (low, true),
            Access::High => (high, true),
            Access::Both => {
                self.read_high = !self.read_high;
                if self.read_high { (low, false) } else { (high, true) }
            }
        };
        if last {
            self.latched_count = None;
        }
        byte
    }
}

fn from_bcd(value: u16) -> u32 {
    (0..4).rev().fold(0, |sum, digit| sum * 10 + u32::from(value >> (4 * digit) & 0xf))
}

fn to_bcd(value: u32) -> u16 {
    (0..4).fold(0, |bcd, digit| bcd | (value / 10u32.pow(digit) % 10) << (4 * digit)) as u16
}

/// The timer chip with the gate and speaker port.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pit {
    channels: [Channel; 3],
    /// Bits 3:0 of port B.
    port_b: u8,
}

impl Default for Pit {
    fn default() -> Pit {
        Pit::new()
    }
}

impl Pit {
    /// After power-on: no channel counts. The gates of channels 0 and 1 are tied high, channel 2's is bit 0 of
    /// port B.
    pub fn new() -> Pit {
        Pit { channels: [Channel::new(true), Channel::new(true), Channel::new(false)], port_b: 0 }
    }

    /// Refuses a restored state that no guest can have reached by guest time `now_ns`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self, now_ns: u64) -> Result<(), BadState> {
        require(
            "PIT",
            &[
                (now_ns <= LATEST, "a time too far in the future"),
                (self.port_b & !0xf == 0, "undefined bits in port B"),
            ],
        )?;
        self.channels.iter().try_for_each(|channel| channel.check(ticks(now_ns)))
    }

    /// Reads port 0x40–0x43 or 0x61 at guest time `now_ns`.
    pub fn read(&mut self, port: u16, now_ns: u64) -> u8 {
        let tick = ticks(now_ns);
        match port {
            0x40..=0x42 => {
                let channel = &mut self.channels[usize::from(port - PORT)];
                channel.advance(tick);
                channel.read(tick)
            }
            PORT_B => {
                self.channels[2].advance(tick);
                // Bit 4 toggles with every DRAM refresh request, every 15.085 µs.
                let refresh = (now_ns / 15_085) as u8 & 1;
                self.port_b | refresh << 4 | u8::from(self.channels[2].out(tick)) << 5
            }
            _ => 0xff,
        }
    }

    /// Writes port 0x40–0x43 or 0x61 at guest time `now_ns`.
    pub fn write(&mut self, port: u16, value: u8, now_ns: u64) {
        let tick = ticks(now_ns);
        match port {
            0x40..=0x42 => self.channels[usize::from(port - PORT)].write(value, tick),
            0x43 => self.write_control(value, tick),
            PORT_B => {
                self.port_b = value & 0xf;
                self.channels[2].set_gate(value & 1 != 0, tick);
            }
            _ => {}
        }
    }

    fn write_control(&mut self, value: u8, tick: u64) {
        match value >> 6 {
            3 => {
                for (index, channel) in self.channels.iter_mut().enumerate() {
                    if value & 2 << index == 0 {
                        continue;
                    }
                    channel.advance(tick);
                    if value & 0x20 == 0 {
                        channel.latch_count(tick);
                    }
                    if value & 0x10 == 0 && channel.latched_status.is_none() {
                        channel.latched_status = Some(channel.status(tick));
                    }
                }
            }
            index => {
                let channel = &mut self.channels[usize::from(index)];
                if value & 0x30 == 0 {
                    channel.advance(tick);
                    channel.latch_count(tick);
                } else {
                    channel.control(value, tick);
                }
            }
        }
    }

    /// Channel 0's output, with what happened since the last call.
    pub fn poll(&mut self, now_ns: u64) -> Out0 {
        let tick = ticks(now_ns);
        let channel = &mut self.channels[0];
        channel.advance(tick);
        Out0 { edge: std::mem::take(&mut channel.edge), level: channel.out(tick) }
    }

    /// The time in ns when channel 0 next raises IRQ 0, at or after `now_ns`; `None` if it will not.
    pub fn next_event(&self, now_ns: u64) -> Option<u64> {
        let channel = &self.channels[0];
        if channel.edge {
            return Some(now_ns);
        }
        channel.next_edge(channel.seen).map(|tick| nanoseconds(tick).max(now_ns))
    }

    /// Whether channel 2 drives the speaker, and with which period in ticks; `None` for silence.
    pub fn speaker(&self) -> Option<u32> {
        let channel = &self.channels[2];
        let sounds = self.port_b & 3 == 3 && channel.is_periodic() && channel.start.is_some();
        sounds.then_some(channel.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Programs a channel at time 0.
    fn programmed(channel: u16, mode: u8, count: u16, at: u64) -> Pit {
        let mut pit = Pit::new();
        if channel == 2 {
            pit.write(PORT_B, 1, 0);
        }
        pit.write(0x43, (channel as u8) << 6 | 0x30 | mode << 1, at);
        pit.write(0x40 + channel, count as u8, at);
        pit.write(0x40 + channel, (count >> 8) as u8, at);
        pit
    }

    fn count(pit: &mut Pit, channel: u16, now: u64) -> u16 {
        pit.write(0x43, (channel as u8) << 6, now);
        let low = pit.read(0x40 + channel, now);
        u16::from_le_bytes([low, pit.read(0x40 + channel, now)])
    }

    fn out(pit: &mut Pit, channel: u16, now: u64) -> bool {
        pit.write(0x43, 0xe0 | 2 << channel, now);
        pit.read(0x40 + channel, now) & 0x80 != 0
    }

    #[test]
    fn ticks_and_nanoseconds_agree() {
        for tick in [0, 1, 2, 1000, 1_193_182, 1_193_183, u64::from(u32::MAX) * 1000] {
            assert_eq!(ticks(nanoseconds(tick)), tick);
            assert!(tick == 0 || ticks(nanoseconds(tick) - 1) == tick - 1);
        }
        assert_eq!(ticks(1_000_000_000), FREQUENCY);
    }

    /// OUT by tick after loading the count, from the data sheet's timing figures.
    #[test]
    fn out_by_mode() {
        for (mode, n, levels) in
            [(0, 4, "000011111"), (2, 3, "110110110"), (3, 4, "110011001"), (3, 5, "111001110"), (4, 4, "111101111")]
        {
            let mut pit = programmed(0, mode, n, 0);
            for (tick, level) in levels.bytes().enumerate() {
                let now = nanoseconds(tick as u64);
                assert_eq!(out(&mut pit, 0, now), level == b'1', "mode {mode} tick {tick}");
            }
        }
    }

    #[test]
    fn count_by_mode() {
        for (mode, n, ticks, value) in [
            (0, 1000, 0, 1000),
            (0, 1000, 999, 1),
            (0, 1000, 1000, 0),
            (0, 1000, 1001, 0xffff),
            (0, 0, 1, 0xffff),
            (2, 1000, 999, 1),
            (2, 1000, 1000, 1000),
            (2, 0, 0, 0),
            (2, 0, 1, 0xffff),
            (3, 1000, 1, 998),
            (3, 1000, 499, 2),
            (3, 1000, 500, 1000),
            (3, 1000, 999, 2),
            (4, 1000, 600, 400),
        ] {
            let mut pit = programmed(0, mode, n, 0);
            assert_eq!(count(&mut pit, 0, nanoseconds(ticks)), value, "mode {mode} count {n} tick {ticks}");
        }
    }

    #[test]
    fn bcd_counts_in_decimal() {
        let mut pit = Pit::new();
        pit.write(0x43, 0x35, 0);
        pit.write(0x40, 0x00, 0);
        pit.write(0x40, 0x10, 0);
        assert_eq!(count(&mut pit, 0, nanoseconds(1)), 0x0999);
        pit.write(0x43, 0x31, 0);
        pit.write(0x40, 0, 0);
        pit.write(0x40, 0, 0);
        assert_eq!(count(&mut pit, 0, nanoseconds(1)), 0x9999);
        assert_eq!((from_bcd(0x1234), to_bcd(1234), to_bcd(10_000)), (1234, 0x1234, 0));
    }

    #[test]
    fn linux_periodic_tick_raises_irq0_at_hz() {
        // pit_set_periodic: 0x34, then LATCH for HZ=250.
        let mut pit = programmed(0, 2, 4773, 5);
        assert_eq!(pit.poll(5), Out0 { edge: true, level: true }, "OUT rises with the mode, as it starts low");
        let mut now = 5;
        for period in 1..=10 {
            let due = pit.next_event(now).unwrap();
            assert_eq!(due, nanoseconds(4773 * period));
            assert!(!pit.poll(due - 1).edge);
            assert_eq!(pit.poll(due), Out0 { edge: true, level: true });
            assert!(!pit.poll(due).edge);
            now = due;
        }
        assert!(pit.poll(now + 1_000_000_000).edge, "missed edges merge");
        assert!(!pit.poll(now + 1_000_000_000).edge);
        assert_eq!(
            pit.next_event(now + 1_000_000_000),
            Some(nanoseconds(ticks(now + 1_000_000_000) / 4773 * 4773 + 4773))
        );
    }

    #[test]
    fn linux_one_shot_and_shutdown() {
        // pit_set_oneshot: 0x38; pit_next_event writes the count; pit_shutdown: 0x30 and a count of 0.
        let mut pit = Pit::new();
        pit.write(0x43, 0x38, 0);
        assert_eq!(pit.next_event(0), Some(0), "OUT went high");
        assert!(pit.poll(0).edge);
        assert_eq!(pit.next_event(0), None);
        pit.write(0x40, 100, 1000);
        pit.write(0x40, 0, 1000);
        let due = pit.next_event(1000).unwrap();
        assert_eq!(due, nanoseconds(1 + 100 + 1));
        assert!(pit.poll(due).edge);
        assert_eq!(pit.next_event(due), None, "once");
        pit.write(0x43, 0x30, due + 10);
        pit.write(0x40, 0, due + 10);
        pit.write(0x40, 0, due + 10);
        assert_eq!(pit.poll(due + 20), Out0 { edge: false, level: false });
    }

    #[test]
    fn linux_tsc_calibration_through_port_b() {
        // pit_calibrate_tsc: gate on, speaker off, mode 0, then spin on OUT2.
        let mut pit = Pit::new();
        let gate = pit.read(PORT_B, 0) & !2 | 1;
        pit.write(PORT_B, gate, 0);
        let latch = 1_193_182 / 100;
        pit.write(0x43, 0xb0, 0);
        pit.write(0x42, latch as u8, 0);
        pit.write(0x42, (latch >> 8) as u8, 0);
        let due = nanoseconds(latch);
        assert_eq!(pit.read(PORT_B, due - 1) & 0x21, 0x01);
        assert_eq!(pit.read(PORT_B, due) & 0x21, 0x21);
    }

    #[test]
    fn quick_calibration_reads_the_high_byte() {
        // quick_pit_calibrate: mode 0, count 0xffff, unlatched reads, low byte then high byte.
        let mut pit = programmed(2, 0, 0xffff, 0);
        for high in [0xff, 0xfe, 0xfd] {
            let now = nanoseconds((0xff - high) * 256 + 1);
            pit.read(0x42, now);
            assert_eq!(pit.read(0x42, now), high as u8);
        }
    }

    #[test]
    fn the_gate_holds_and_triggers() {
        let mut pit = programmed(2, 0, 1000, 0);
        pit.write(PORT_B, 0, nanoseconds(400));
        assert_eq!(count(&mut pit, 2, nanoseconds(900)), 600);
        pit.write(PORT_B, 1, nanoseconds(5000));
        assert_eq!(count(&mut pit, 2, nanoseconds(5100)), 500);

        let mut pit = programmed(2, 2, 1000, 0);
        pit.write(PORT_B, 0, nanoseconds(999));
        assert!(out(&mut pit, 2, nanoseconds(999)), "a low gate forces OUT high");
        pit.write(PORT_B, 1, nanoseconds(5000));
        assert_eq!(count(&mut pit, 2, nanoseconds(5000)), 1000, "and a rising one reloads");

        let mut pit = programmed(2, 1, 100, 0);
        assert!(out(&mut pit, 2, nanoseconds(50)), "mode 1 waits for a trigger");
        pit.write(PORT_B, 0, nanoseconds(60));
        pit.write(PORT_B, 1, nanoseconds(70));
        assert!(!out(&mut pit, 2, nanoseconds(169)));
        assert!(out(&mut pit, 2, nanoseconds(170)));
    }

    #[test]
    fn a_new_count_waits_for_the_end_of_the_period() {
        let mut pit = programmed(0, 2, 1000, 0);
        pit.write(0x40, 100, nanoseconds(300));
        pit.write(0x40, 0, nanoseconds(300));
        pit.write(0x43, 0xe2, nanoseconds(300));
        assert_eq!(pit.read(0x40, nanoseconds(300)) & 0x40, 0x40, "null count");
        assert_eq!(count(&mut pit, 0, nanoseconds(900)), 100);
        pit.poll(nanoseconds(901));
        assert_eq!(pit.next_event(0), Some(nanoseconds(1000)));
        assert!(pit.poll(nanoseconds(1000)).edge);
        assert_eq!(pit.next_event(0), Some(nanoseconds(1100)));
    }

    #[test]
    fn access_modes_latches_and_read_back() {
        let mut pit = programmed(0, 2, 0x1234, 0);
        // A count latch holds over time, and a second one does not replace it.
        pit.write(0x43, 0x00, nanoseconds(4));
        pit.write(0x43, 0x00, nanoseconds(100));
        assert_eq!([pit.read(0x40, nanoseconds(200)), pit.read(0x40, nanoseconds(300))], [0x30, 0x12]);
        // Read back status and count: status comes first.
        pit.write(0x43, 0xc2, nanoseconds(4));
        assert_eq!([0; 3].map(|_| pit.read(0x40, nanoseconds(9))), [0xb4, 0x30, 0x12]);
        // Low byte only, high byte only.
        pit.write(0x43, 0x14, 0);
        pit.write(0x40, 0x80, 0);
        assert_eq!([0; 2].map(|_| pit.read(0x40, 0)), [0x80, 0x80]);
        pit.write(0x43, 0x24, 0);
        pit.write(0x40, 0x80, 0);
        assert_eq!(count(&mut pit, 0, 0), 0x8080, "both reads give the high byte");
        // Modes 6 and 7 are 2 and 3.
        pit.write(0x43, 0x3e, 0);
        pit.write(0x43, 0xe2, 0);
        assert_eq!(pit.read(0x40, 0) & 0x7e, 0x76);
    }

    #[test]
    fn speaker_and_refresh() {
        let mut pit = programmed(2, 3, 1193, 0);
        assert_eq!(pit.speaker(), None);
        pit.write(PORT_B, 3, 0);
        assert_eq!(pit.speaker(), Some(1193));
        assert_eq!(pit.read(PORT_B, 0) & 0x10, 0);
        assert_eq!(pit.read(PORT_B, 15_085) & 0x10, 0x10);
    }

    #[test]
    fn any_writes_are_survived() {
        let mut pit = Pit::new();
        let mut seed = 7u64;
        for _ in 0..100_000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let now = seed >> 20;
            let port = [0x40, 0x41, 0x42, 0x43, 0x43, 0x61][(seed >> 33) as usize % 6];
            if seed & 0x1000 != 0 {
                pit.write(port, (seed >> 40) as u8, now);
            } else {
                pit.read(port, now);
            }
            pit.poll(now);
            assert!(pit.next_event(now).is_none_or(|due| due >= now));
        }
    }
}
