//! The MC146818 real-time clock with its CMOS memory (Motorola data sheet; ports 0x70 and 0x71).
//!
//! **Idea.** The clock does not tick: it shows UTC at guest time zero plus guest time plus what the guest
//! has set. Alarm, update and periodic flags are worked out for the time since the last look. Times are
//! guest nanoseconds.
//!
//! IRQ 8 is a level, [`Rtc::interrupt`]; call [`Rtc::poll`] when [`Rtc::next_event`] is due and look at the
//! level after every access. While the guest has no interrupt enabled there are no events.
//!
//! CMOS bytes tell the memory size the way a PC's firmware leaves it there (as Bochs and QEMU do above
//! 64 MiB). The century is at 0x32, as the FADT says.

use crate::state::{BadState, LATEST, hex, require};
use serde::{Deserialize, Serialize};

/// First of the two ports (index, data).
pub const PORT: u16 = 0x70;
/// Its ISA interrupt.
pub const IRQ: u8 = 8;
/// CMOS index of the century, for the FADT.
pub const CENTURY: u8 = 0x32;

const SECOND: u64 = 1_000_000_000;
/// UIP rises this long before an update (data sheet, t_BUC).
const UPDATE_WARNING: u64 = 244_000;

const REG_A: usize = 0x0a;
const REG_B: usize = 0x0b;
const REG_C: usize = 0x0c;
const REG_D: usize = 0x0d;

mod a {
    pub const UIP: u8 = 1 << 7;
}

mod b {
    pub const SET: u8 = 1 << 7;
    pub const PIE: u8 = 1 << 6;
    pub const AIE: u8 = 1 << 5;
    pub const UIE: u8 = 1 << 4;
    /// Binary instead of BCD.
    pub const DM: u8 = 1 << 2;
    /// 24 hours instead of 12.
    pub const H24: u8 = 1 << 1;
}

mod c {
    pub const IRQF: u8 = 1 << 7;
    pub const PF: u8 = 1 << 6;
    pub const AF: u8 = 1 << 5;
    pub const UF: u8 = 1 << 4;
}

/// 128-bit nanoseconds as seconds and nanoseconds, because few formats have numbers so large.
mod parts {
    use super::SECOND;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(ns: &i128, serializer: S) -> Result<S::Ok, S::Error> {
        let second = i128::from(SECOND);
        // Beyond 64 bits of seconds is no date; `check` refuses long before.
        (ns.div_euclid(second) as i64, ns.rem_euclid(second) as u32).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i128, D::Error> {
        let (seconds, ns) = <(i64, u32)>::deserialize(deserializer)?;
        Ok(i128::from(seconds) * i128::from(SECOND) + i128::from(ns))
    }
}

/// A point in time by calendar, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Calendar {
    year: i64,
    /// 1–12.
    month: u8,
    /// 1–31.
    day: u8,
    /// 1 is Sunday.
    weekday: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

/// The clock and its memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rtc {
    index: u8,
    #[serde(with = "hex")]
    cmos: [u8; 128],
    /// What the clock shows is guest time plus this, in ns since 1970.
    #[serde(with = "parts")]
    offset: i128,
    /// Guest time up to which flags in register C are worked out.
    seen: u64,
}

impl Rtc {
    /// A clock that shows `unix_ns` (ns since 1970, UTC) at guest time `now_ns`, over memory sizes in bytes
    /// below and above 4 GiB.
    pub fn new(unix_ns: u64, now_ns: u64, memory_below_4g: u64, memory_above_4g: u64) -> Rtc {
        let mut cmos = [0; 128];
        // 32.768 kHz time base, 1.024 kHz rate; 24 hours, BCD; battery good.
        cmos[REG_A] = 0x26;
        cmos[REG_B] = b::H24;
        cmos[REG_D] = 0x80;
        let mut put = |at: usize, value: u64, bytes: usize| {
            let value = value.min((1 << (8 * bytes)) - 1);
            cmos[at..at + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
        };
        let extended = memory_below_4g.saturating_sub(1 << 20) >> 10;
        put(0x15, 640, 2);
        put(0x17, extended, 2);
        put(0x30, extended, 2);
        put(0x34, memory_below_4g.saturating_sub(16 << 20) >> 16, 2);
        put(0x5b, memory_above_4g >> 16, 3);
        let mut rtc = Rtc { index: 0, cmos, offset: i128::from(unix_ns) - i128::from(now_ns), seen: now_ns };
        rtc.show(now_ns);
        rtc
    }

    /// Refuses a restored state that no guest can have reached by guest time `now_ns`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self, now_ns: u64) -> Result<(), BadState> {
        // The year 99,999 in nanoseconds is less than 2^72.
        let shown = -(1 << 72)..1 << 72;
        require(
            "RTC",
            &[
                (now_ns <= LATEST, "a time too far in the future"),
                (self.index <= 0x7f, "no such register"),
                (shown.contains(&self.offset), "an impossible date"),
                (self.seen <= now_ns, "it was seen in the future"),
                (self.cmos[REG_A] & a::UIP == 0, "undefined bits in register A"),
            ],
        )
    }

    /// Real time went on by `ns` while guest time stood still: the clock shows that much more.
    pub fn skip(&mut self, ns: i64) {
        self.offset += i128::from(ns);
    }

    /// Reads port 0x70 or 0x71.
    pub fn read(&mut self, port: u16, now_ns: u64) -> u8 {
        if port == PORT {
            // Write-only on a PC.
            return 0xff;
        }
        let index = usize::from(self.index);
        self.poll(now_ns);
        match index {
            0..=9 | 0x32 => {
                if self.is_running() {
                    self.show(now_ns);
                }
                self.cmos[index]
            }
            REG_A => {
                let warning = (self.unix(now_ns) + i128::from(UPDATE_WARNING)).div_euclid(SECOND.into());
                let updating = self.is_running() && warning > self.seconds(now_ns).into();
                self.cmos[REG_A] | if updating { a::UIP } else { 0 }
            }
            REG_C => std::mem::take(&mut self.cmos[REG_C]),
            _ => self.cmos[index],
        }
    }

    /// Writes port 0x70 (bit 7, the NMI mask, is not part of the index) or 0x71.
    pub fn write(&mut self, port: u16, value: u8, now_ns: u64) {
        if port == PORT {
            self.index = value & 0x7f;
            return;
        }
        let index = usize::from(self.index);
        self.poll(now_ns);
        match index {
            // Alarm registers.
            1 | 3 | 5 => self.cmos[index] = value,
            0..=9 | 0x32 => {
                if self.is_running() {
                    // Hardware leaves the result to chance; a consistent time is the kindest one.
                    self.show(now_ns);
                    self.cmos[index] = value;
                    self.take_over(now_ns);
                } else {
                    self.cmos[index] = value;
                }
            }
            REG_A => {
                let was_running = self.is_running();
                self.cmos[REG_A] = value & !a::UIP;
                self.start_or_stop(was_running, now_ns);
            }
            REG_B => {
                let was_running = self.is_running();
                if was_running {
                    self.show(now_ns);
                }
                // SET clears UIE.
                self.cmos[REG_B] = if value & b::SET != 0 { value & !b::UIE } else { value };
                self.start_or_stop(was_running, now_ns);
                self.update_irqf();
            }
            REG_C | REG_D => {}
            _ => self.cmos[index] = value,
        }
    }

    /// Works out what happened up to `now_ns`.
    pub fn poll(&mut self, now_ns: u64) {
        let from = self.seen;
        if now_ns <= from {
            return;
        }
        self.seen = now_ns;
        if let Some(period) = self.period()
            && now_ns / period > from / period
        {
            self.cmos[REG_C] |= c::PF;
        }
        let (before, after) = (self.seconds(from), self.seconds(now_ns));
        if self.is_running() && after > before {
            self.cmos[REG_C] |= c::UF;
            if self.next_alarm(before).is_some_and(|at| at <= after) {
                self.cmos[REG_C] |= c::AF;
            }
        }
        self.update_irqf();
    }

    /// The level of IRQ 8.
    pub fn interrupt(&self) -> bool {
        self.cmos[REG_C] & c::IRQF != 0
    }

    /// When [`Rtc::poll`] will find an interrupt that the guest has enabled; `None` if nothing is to come
    /// before register C is read.
    pub fn next_event(&self) -> Option<u64> {
        let enabled = self.cmos[REG_B];
        if self.interrupt() {
            return None;
        }
        let periodic = match self.period() {
            Some(period) if enabled & b::PIE != 0 => Some((self.seen / period + 1) * period),
            _ => None,
        };
        let second = self.seconds(self.seen);
        let update = (enabled & b::UIE != 0 && self.is_running()).then_some(second + 1);
        let alarm = if enabled & b::AIE != 0 && self.is_running() { self.next_alarm(second) } else { None };
        let by_second = update.into_iter().chain(alarm).min().map(|second| self.guest_time(second));
        periodic.into_iter().chain(by_second).min()
    }

    fn update_irqf(&mut self) {
        let causes = self.cmos[REG_B] & self.cmos[REG_C] & (c::PF | c::AF | c::UF);
        if causes != 0 {
            self.cmos[REG_C] |= c::IRQF;
        } else {
            self.cmos[REG_C] &= !c::IRQF;
        }
    }

    /// Neither SET nor a divider held in reset.
    fn is_running(&self) -> bool {
        self.cmos[REG_B] & b::SET == 0 && self.cmos[REG_A] & 0x60 != 0x60
    }

    fn start_or_stop(&mut self, was_running: bool, now_ns: u64) {
        if !was_running && self.is_running() {
            self.take_over(now_ns);
        }
    }

    /// The periodic interrupt's period in ns, rounded to what 32.768 kHz divides into.
    fn period(&self) -> Option<u64> {
        let rate = match self.cmos[REG_A] & 0xf {
            0 => return None,
            // 1 and 2 are the rates of 8 and 9 with this time base.
            rate @ 1..=2 => rate + 7,
            rate => rate,
        };
        Some((SECOND << (rate - 1)) / 32_768)
    }

    fn unix(&self, now_ns: u64) -> i128 {
        i128::from(now_ns) + self.offset
    }

    fn seconds(&self, now_ns: u64) -> i64 {
        self.unix(now_ns).div_euclid(SECOND.into()) as i64
    }

    /// Guest time at which the clock shows second `unix`.
    fn guest_time(&self, unix: i64) -> u64 {
        (i128::from(unix) * i128::from(SECOND) - self.offset).max(0) as u64
    }

    /// Fills the time registers.
    fn show(&mut self, now_ns: u64) {
        let time = Calendar::from_unix(self.seconds(now_ns));
        for (index, value) in [
            (0, time.second),
            (2, time.minute),
            (6, time.weekday),
            (7, time.day),
            (8, time.month),
            (9, time.year.rem_euclid(100) as u8),
            (0x32, time.year.div_euclid(100).rem_euclid(100) as u8),
        ] {
            self.cmos[index] = self.encode(value);
        }
        self.cmos[4] = if self.cmos[REG_B] & b::H24 != 0 {
            self.encode(time.hour)
        } else {
            self.encode((time.hour + 11) % 12 + 1) | if time.hour >= 12 { 0x80 } else { 0 }
        };
    }

    /// Makes the time registers what the clock shows from `now_ns` on, at the start of that second.
    fn take_over(&mut self, now_ns: u64) {
        let time = Calendar {
            year: i64::from(self.decode(self.cmos[0x32])) * 100 + i64::from(self.decode(self.cmos[9])),
            month: self.decode(self.cmos[8]),
            day: self.decode(self.cmos[7]),
            weekday: 1,
            hour: self.decode_hour(self.cmos[4]),
            minute: self.decode(self.cmos[2]),
            second: self.decode(self.cmos[0]),
        };
        self.offset = i128::from(time.to_unix()) * i128::from(SECOND) - i128::from(now_ns);
    }

    /// The first second after `after` that matches the alarm; a register of 0xc0 or more matches any value.
    fn next_alarm(&self, after: i64) -> Option<i64> {
        let wanted = |value: u8, decoded: u8| (value < 0xc0).then_some(i64::from(decoded));
        let second = wanted(self.cmos[1], self.decode(self.cmos[1]));
        let minute = wanted(self.cmos[3], self.decode(self.cmos[3]));
        let hour = wanted(self.cmos[5], self.decode_hour(self.cmos[5]));
        let limit = after + 2 * 86_400;
        let mut at = after + 1;
        // Skips to the next hour, minute or second; at most 24 + 60 + 60 steps and a few.
        while at < limit {
            if hour.is_some_and(|hour| at.rem_euclid(86_400) / 3_600 != hour) {
                at = (at.div_euclid(3_600) + 1) * 3_600;
            } else if minute.is_some_and(|minute| at.rem_euclid(3_600) / 60 != minute) {
                at = (at.div_euclid(60) + 1) * 60;
            } else if second.is_some_and(|second| at.rem_euclid(60) != second) {
                at += 1;
            } else {
                return Some(at);
            }
        }
        None
    }

    fn encode(&self, value: u8) -> u8 {
        if self.cmos[REG_B] & b::DM != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.cmos[REG_B] & b::DM != 0 { value } else { (value >> 4) * 10 + (value & 0xf) }
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.cmos[REG_B] & b::H24 != 0 {
            return self.decode(value);
        }
        self.decode(value & 0x7f) % 12 + if value & 0x80 != 0 { 12 } else { 0 }
    }
}

impl Calendar {
    /// From seconds since 1970, after Howard Hinnant's `civil_from_days`.
    fn from_unix(seconds: i64) -> Calendar {
        let days = seconds.div_euclid(86_400);
        let in_day = seconds.rem_euclid(86_400);
        let shifted = days + 719_468;
        let era = shifted.div_euclid(146_097);
        let day_of_era = shifted.rem_euclid(146_097);
        let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        // Years begin in March here.
        let month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * month + 2) / 5 + 1;
        let month = if month < 10 { month + 3 } else { month - 9 };
        Calendar {
            year: year_of_era + era * 400 + i64::from(month <= 2),
            month: month as u8,
            day: day as u8,
            weekday: ((days + 4).rem_euclid(7) + 1) as u8,
            hour: (in_day / 3_600) as u8,
            minute: (in_day / 60 % 60) as u8,
            second: (in_day % 60) as u8,
        }
    }

    /// To seconds since 1970; fields out of range carry over.
    fn to_unix(self) -> i64 {
        let month = i64::from(self.month.clamp(1, 12));
        let year = self.year - i64::from(month <= 2);
        let era = year.div_euclid(400);
        let year_of_era = year.rem_euclid(400);
        let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + i64::from(self.day) - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * 146_097 + day_of_era - 719_468;
        days * 86_400 + i64::from(self.hour) * 3_600 + i64::from(self.minute) * 60 + i64::from(self.second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-11-22 17:05:06 UTC, a Sunday.
    const UNIX: u64 = 1_795_367_106;
    const MS: u64 = 1_000_000;

    fn clock() -> Rtc {
        Rtc::new(UNIX * SECOND, 0, 0, 0)
    }

    fn get(rtc: &mut Rtc, index: u8, now: u64) -> u8 {
        rtc.write(0x70, index, now);
        rtc.read(0x71, now)
    }

    fn set(rtc: &mut Rtc, index: u8, value: u8, now: u64) {
        rtc.write(0x70, index, now);
        rtc.write(0x71, value, now);
    }

    fn time(rtc: &mut Rtc, now: u64) -> [u8; 8] {
        [0x32, 9, 8, 7, 6, 4, 2, 0].map(|index| get(rtc, index, now))
    }

    #[test]
    fn calendar_conversions() {
        for (unix, year, month, day, weekday, hour, minute, second) in [
            (0, 1970, 1, 1, 5, 0, 0, 0),
            (951_782_400, 2000, 2, 29, 3, 0, 0, 0),
            (UNIX as i64, 2026, 11, 22, 1, 17, 5, 6),
            (4_107_542_399, 2100, 2, 28, 1, 23, 59, 59),
            (4_107_542_400, 2100, 3, 1, 2, 0, 0, 0),
            (-1, 1969, 12, 31, 4, 23, 59, 59),
        ] {
            let calendar = Calendar { year, month, day, weekday, hour, minute, second };
            assert_eq!(Calendar::from_unix(unix), calendar);
            assert_eq!(calendar.to_unix(), unix);
        }
    }

    #[test]
    fn shows_the_time_in_every_format() {
        // Register B, and the registers after 4 seconds: century, year, month, day, weekday, hour, minute, second.
        for (format, expected) in [
            (b::H24, [0x20, 0x26, 0x11, 0x22, 0x01, 0x17, 0x05, 0x10]),
            (b::H24 | b::DM, [20, 26, 11, 22, 1, 17, 5, 10]),
            (0, [0x20, 0x26, 0x11, 0x22, 0x01, 0x85, 0x05, 0x10]),
            (b::DM, [20, 26, 11, 22, 1, 0x85, 5, 10]),
        ] {
            let mut rtc = clock();
            set(&mut rtc, 0x0b, format, 0);
            assert_eq!(time(&mut rtc, 4 * SECOND), expected, "register B {format:#x}");
        }
        let mut rtc = clock();
        set(&mut rtc, 0x0b, 0, 0);
        // Noon and midnight in 12-hour format.
        for (hours, expected) in [(7, 0x12), (6, 0x91), (19, 0x92), (20, 0x81)] {
            assert_eq!(get(&mut rtc, 4, hours * 3_600 * SECOND), expected, "{hours} hours later");
        }
    }

    #[test]
    fn is_set_the_way_linux_does() {
        // mc146818_set_time: SET and divider reset, write, restore.
        let mut rtc = clock();
        set(&mut rtc, 0x0b, b::H24 | b::SET, 0);
        set(&mut rtc, 0x0a, 0x76, 0);
        for (index, value) in [(9, 0x30), (8, 0x12), (7, 0x31), (4, 0x23), (2, 0x59), (0, 0x58), (0x32, 0x20)] {
            set(&mut rtc, index, value, 0);
        }
        assert_eq!(get(&mut rtc, 0, 5 * SECOND), 0x58, "stands still");
        set(&mut rtc, 0x0b, b::H24, 6 * SECOND);
        set(&mut rtc, 0x0a, 0x26, 7 * SECOND + SECOND / 2);
        assert_eq!(time(&mut rtc, 8 * SECOND), [0x20, 0x30, 0x12, 0x31, 0x03, 0x23, 0x59, 0x58]);
        assert_eq!(time(&mut rtc, 9 * SECOND + SECOND / 2), [0x20, 0x31, 0x01, 0x01, 0x04, 0, 0, 0]);
    }

    #[test]
    fn update_in_progress_warns_of_the_second() {
        let mut rtc = clock();
        for (now, uip) in
            [(0, 0), (SECOND - UPDATE_WARNING - 1, 0), (SECOND - UPDATE_WARNING, 0x80), (SECOND - 1, 0x80), (SECOND, 0)]
        {
            assert_eq!(get(&mut rtc, 0x0a, now), 0x26 | uip, "at {now}");
        }
        set(&mut rtc, 0x0b, b::H24 | b::SET, SECOND);
        assert_eq!(get(&mut rtc, 0x0a, 2 * SECOND - 1), 0x26, "no updates while SET");
    }

    #[test]
    fn update_interrupt() {
        let mut rtc = clock();
        assert_eq!(rtc.next_event(), None);
        set(&mut rtc, 0x0b, b::H24 | b::UIE, 100);
        assert_eq!(rtc.next_event(), Some(SECOND));
        rtc.poll(SECOND - 1);
        assert!(!rtc.interrupt());
        rtc.poll(SECOND);
        assert!(rtc.interrupt());
        assert_eq!(rtc.next_event(), None);
        assert_eq!(get(&mut rtc, 0x0c, SECOND + 5) & !c::PF, 0x90);
        assert!(!rtc.interrupt());
        assert_eq!(rtc.next_event(), Some(2 * SECOND));
        set(&mut rtc, 0x0b, b::H24 | b::UIE | b::SET, SECOND + 6);
        assert_eq!(get(&mut rtc, 0x0b, SECOND + 6), b::H24 | b::SET);
    }

    #[test]
    fn alarm_interrupt() {
        // Alarm hour, minute, second, and seconds from 17:05:06 until it.
        for (alarm, expected) in [
            ([0x17, 0x05, 0x07], 1),
            ([0x17, 0x05, 0x06], 86_400),
            ([0x18, 0x00, 0x00], 54 * 60 + 54),
            ([0x17, 0x04, 0x00], 86_400 - 66),
            ([0xff, 0xff, 0x06], 60),
            ([0xff, 0xff, 0xff], 1),
            ([0xc0, 0x05, 0x05], 3_599),
        ] {
            let mut rtc = clock();
            for (index, value) in [5, 3, 1].into_iter().zip(alarm) {
                set(&mut rtc, index, value, 0);
            }
            set(&mut rtc, 0x0b, b::H24 | b::AIE, 0);
            assert_eq!(rtc.next_event(), Some(expected * SECOND), "{alarm:x?}");
            rtc.poll(expected * SECOND - 1);
            assert!(!rtc.interrupt());
            rtc.poll(expected * SECOND);
            assert!(rtc.interrupt());
            assert_eq!(get(&mut rtc, 0x0c, expected * SECOND) & (c::IRQF | c::AF), 0xa0);
        }
        let mut rtc = clock();
        set(&mut rtc, 5, 0x25, 0);
        set(&mut rtc, 0x0b, b::H24 | b::AIE, 0);
        assert_eq!(rtc.next_event(), None, "there is no hour 25");
    }

    #[test]
    fn periodic_interrupt() {
        for (rate, period) in [(6, 976_562), (3, 122_070), (15, 500 * MS), (1, 3_906_250), (2, 7_812_500)] {
            let mut rtc = clock();
            set(&mut rtc, 0x0a, 0x20 | rate, 0);
            set(&mut rtc, 0x0b, b::H24 | b::PIE, 0);
            assert_eq!(rtc.next_event(), Some(period), "rate {rate}");
            rtc.poll(period);
            assert_eq!(get(&mut rtc, 0x0c, period), 0xc0);
            assert_eq!(rtc.next_event(), Some(2 * period));
        }
        let mut rtc = clock();
        set(&mut rtc, 0x0a, 0x20, 0);
        set(&mut rtc, 0x0b, b::H24 | b::PIE, 0);
        assert_eq!(rtc.next_event(), None);
    }

    #[test]
    fn flags_are_set_without_interrupts_too() {
        let mut rtc = clock();
        assert_eq!(get(&mut rtc, 0x0c, 3 * SECOND) & 0x50, 0x50);
        assert_eq!(get(&mut rtc, 0x0c, 3 * SECOND), 0);
        rtc.poll(5 * SECOND);
        set(&mut rtc, 0x0b, b::H24 | b::UIE, 5 * SECOND);
        assert!(rtc.interrupt(), "a flag that is set interrupts as soon as it is enabled");
    }

    #[test]
    fn memory_sizes_and_the_rest_of_the_cmos() {
        let mut rtc = Rtc::new(0, 0, 3 << 30, 5 << 30);
        for (index, value) in [
            (0x0d, 0x80),
            (0x15, 0x80),
            (0x16, 0x02),
            (0x17, 0xff),
            (0x18, 0xff),
            (0x34, 0x00),
            (0x35, 0xbf),
            (0x5b, 0x00),
            (0x5c, 0x40),
            (0x5d, 0x01),
        ] {
            assert_eq!(get(&mut rtc, index, 0), value, "CMOS {index:#x}");
        }
        set(&mut rtc, 0x80 | 0x0f, 0x0a, 0);
        assert_eq!(get(&mut rtc, 0x0f, 0), 0x0a, "bit 7 of the index is the NMI mask");
        set(&mut rtc, 0x0d, 0, 0);
        assert_eq!(get(&mut rtc, 0x0d, 0), 0x80);
        assert_eq!(rtc.read(0x70, 0), 0xff);
    }

    #[test]
    fn any_writes_are_survived() {
        let mut rtc = clock();
        let mut seed = 3u64;
        for _ in 0..100_000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let now = seed >> 10;
            set(&mut rtc, (seed >> 33) as u8 & 0x3f, (seed >> 40) as u8, now);
            get(&mut rtc, (seed >> 50) as u8, now);
            rtc.next_event();
        }
    }
}
