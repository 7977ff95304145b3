//! One TCP connection's end toward the guest (RFC 9293), without the socket behind it: segments in, segments out, time in.
//!
//! The wire is a queue in memory, which loses nothing and keeps the order, and what is behind it is a socket of the host
//! that does all that the network needs. So this end has no congestion control, keeps nothing that comes out of
//! order, and takes a segment of any size. The guest may still drop what it gets; it is sent again from
//! [`Connection::out`], which holds all that is not acknowledged.

use crate::ring::Ring;
use smoltcp::wire::{TcpControl, TcpRepr};
use std::time::{Duration, Instant};

/// How long to wait for an acknowledgement at first; doubled each time.
const RETRANSMIT: Duration = Duration::from_millis(400);
const BACKOFF_MAX: u32 = 7;
/// After so many of them in vain the guest is taken for gone.
const ATTEMPTS: u32 = 12;
/// As that, for a guest that has not answered at all.
const SYN_ATTEMPTS: u32 = 5;
/// Our window is told in units of this power of two.
const SCALE: u8 = 7;
/// Largest segment that the guest is told it may send: what an IPv4 packet has room for.
const MSS: u16 = 65495;
/// What a peer that says nothing takes (RFC 9293, 3.7.1).
const MSS_DEFAULT: u16 = 536;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The guest has asked; the host is being asked.
    Connecting,
    /// The guest has asked, and gets a yes that it has not acknowledged.
    Accepting,
    /// The guest is being asked.
    Asking,
    Open,
}

pub struct Connection {
    stage: Stage,
    /// From the host, from sequence number `una` on (or behind the SYN).
    pub out: Ring,
    /// Oldest sequence number that the guest has not acknowledged, the next one to send, and behind the last one sent.
    una: u32,
    next: u32,
    top: u32,
    /// What the guest takes from `una` on, in bytes.
    window: u32,
    scale: u8,
    mss: u16,
    /// The host sends no more than `out`.
    finished: bool,
    finish_acknowledged: bool,
    /// From the guest, for the host.
    pub back: Ring,
    /// Next sequence number of the guest's, and behind the last one that it was told it may send.
    expected: u32,
    edge: u32,
    our_scale: u8,
    /// The guest sends no more than `back`.
    ended: bool,
    /// Most bytes in each of the rings.
    limit: usize,
    acknowledge: bool,
    /// When to send again, and how often that has been.
    deadline: Option<Instant>,
    attempts: u32,
    /// Acknowledgements that say nothing new; and up to where the guest has lost something (RFC 6582).
    duplicates: u8,
    recover: Option<u32>,
    resend: bool,
    /// One segment at a time until something is acknowledged; one byte beyond the window.
    careful: bool,
    probe: bool,
}

/// What a segment of the guest's comes to.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict<'a> {
    /// Nothing for the host.
    Nothing,
    /// These bytes are next, and the end behind them if so. [`Connection::accept`] is to follow.
    Data { bytes: &'a [u8], end: bool },
    /// The guest has broken the connection.
    Reset,
}

/// A segment to send: `length` bytes of [`Connection::out`] from `offset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub control: TcpControl,
    pub sequence: u32,
    pub acknowledgement: Option<u32>,
    pub window: u16,
    pub scale: Option<u8>,
    pub mss: Option<u16>,
    pub offset: usize,
    pub length: usize,
    /// Bytes that the guest takes in one segment.
    pub guest_mss: u16,
}

/// Whether sequence number `a` is before `b`.
fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

impl Connection {
    fn new(stage: Stage, initial: u32, limit: usize) -> Connection {
        Connection {
            stage,
            out: Ring::default(),
            una: initial,
            next: initial,
            top: initial,
            window: 0,
            scale: 0,
            mss: MSS_DEFAULT,
            finished: false,
            finish_acknowledged: false,
            back: Ring::default(),
            expected: 0,
            edge: 0,
            our_scale: SCALE,
            ended: false,
            limit,
            acknowledge: false,
            deadline: None,
            attempts: 0,
            duplicates: 0,
            recover: None,
            resend: false,
            careful: false,
            probe: false,
        }
    }

    /// One that the guest has asked for with `syn`; nothing is sent before [`Connection::connected`]. Our sequence numbers
    /// begin with `initial`; each ring gets at most `limit` bytes.
    pub fn from_guest(syn: &TcpRepr<'_>, initial: u32, limit: usize) -> Connection {
        let mut connection = Connection::new(Stage::Connecting, initial, limit);
        connection.take_options(syn);
        connection
    }

    /// One that the guest is to be asked for.
    pub fn to_guest(initial: u32, limit: usize) -> Connection {
        Connection::new(Stage::Asking, initial, limit)
    }

    fn take_options(&mut self, syn: &TcpRepr<'_>) {
        self.expected = (syn.seq_number.0 as u32).wrapping_add(1);
        self.edge = self.expected;
        self.mss = syn.max_seg_size.unwrap_or(MSS_DEFAULT).max(64);
        // A SYN's own window is never scaled (RFC 7323, 2.2).
        self.window = syn.window_len.into();
        match syn.window_scale {
            Some(scale) => self.scale = scale,
            None => (self.scale, self.our_scale) = (0, 0),
        }
    }

    /// The host has said yes.
    pub fn connected(&mut self) {
        if self.stage == Stage::Connecting {
            self.stage = Stage::Accepting;
        }
    }

    /// Whether the host is still being asked.
    pub fn is_connecting(&self) -> bool {
        self.stage == Stage::Connecting
    }

    /// Bytes that the guest takes in one segment.
    pub fn guest_mss(&self) -> usize {
        self.mss.into()
    }

    /// Bytes of `out` that have not been sent.
    pub fn unsent(&self) -> usize {
        self.out.len().saturating_sub(self.next.wrapping_sub(self.una) as usize)
    }

    /// Whether the guest may send, and be sent, data.
    pub fn is_open(&self) -> bool {
        self.stage == Stage::Open
    }

    /// Neither side has more to say, and each knows it of the other.
    pub fn is_over(&self) -> bool {
        self.finish_acknowledged && self.ended && self.back.is_empty() && !self.acknowledge
    }

    /// The guest has said that it sends no more than what is in `back`.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// The host sends no more than what is in `out`.
    pub fn finish(&mut self) {
        self.finished = true;
    }

    /// Most bytes in `out`; with what it holds, what may be read from the host.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// When [`Connection::expire`] is to be called.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Our next sequence number and the guest's, for a reset.
    pub fn numbers(&self) -> (u32, u32) {
        (self.top, self.expected)
    }

    /// Takes a segment of the guest's.
    pub fn segment<'a>(&mut self, segment: &TcpRepr<'a>, now: Instant) -> Verdict<'a> {
        let sequence = segment.seq_number.0 as u32;
        let acknowledged = segment.ack_number.map(|number| number.0 as u32);
        if segment.control == TcpControl::Rst {
            return self.reset(sequence, acknowledged);
        }
        match (self.stage, segment.control) {
            (Stage::Connecting, _) => return Verdict::Nothing,
            (Stage::Asking, TcpControl::Syn) if acknowledged == Some(self.una.wrapping_add(1)) => {
                self.take_options(segment);
                self.open(now);
                self.acknowledge = true;
                return Verdict::Nothing;
            }
            (Stage::Asking, _) => return Verdict::Nothing,
            (Stage::Accepting, TcpControl::Syn) => {
                // It has not seen the answer.
                self.next = self.una;
                return Verdict::Nothing;
            }
            (Stage::Accepting, _) if acknowledged != Some(self.una.wrapping_add(1)) => return Verdict::Nothing,
            (Stage::Accepting, _) => {
                self.open(now);
                self.window = u32::from(segment.window_len) << self.scale;
            }
            (Stage::Open, TcpControl::Syn) => {
                // RFC 5961, 4.2.
                self.acknowledge = true;
                return Verdict::Nothing;
            }
            (Stage::Open, _) => {}
        }
        let Some(acknowledged) = acknowledged else { return Verdict::Nothing };
        let plain = segment.payload.is_empty() && segment.control != TcpControl::Fin;
        self.take_acknowledgement(acknowledged, u32::from(segment.window_len) << self.scale, plain, now);
        self.data(sequence, segment)
    }

    fn open(&mut self, now: Instant) {
        self.stage = Stage::Open;
        self.una = self.una.wrapping_add(1);
        (self.next, self.top) = (self.una, self.una);
        self.attempts = 0;
        self.arm(now);
    }

    /// A reset counts if it is at the right place (RFC 5961, 3.2).
    fn reset(&mut self, sequence: u32, acknowledged: Option<u32>) -> Verdict<'static> {
        match self.stage {
            Stage::Asking if acknowledged == Some(self.una.wrapping_add(1)) => return Verdict::Reset,
            Stage::Asking => {}
            _ if sequence == self.expected => return Verdict::Reset,
            _ if before(self.expected, sequence) && before(sequence, self.edge) => self.acknowledge = true,
            _ => {}
        }
        Verdict::Nothing
    }

    fn take_acknowledgement(&mut self, number: u32, window: u32, plain: bool, now: Instant) {
        if before(self.top, number) {
            self.acknowledge = true;
            return;
        }
        if before(number, self.una) {
            return;
        }
        let news = number.wrapping_sub(self.una) as usize;
        if news == 0 {
            if plain && window == self.window && self.next != self.una {
                self.duplicates = self.duplicates.saturating_add(1);
                if self.duplicates == 3 && self.recover.is_none() {
                    (self.recover, self.resend) = (Some(self.top), true);
                }
            }
            if self.probe {
                // It is there, however long its window stays closed (RFC 9293, 3.8.6.1).
                self.attempts = 0;
            }
        } else {
            let bytes = news.min(self.out.len());
            self.out.consume(bytes);
            // Beyond the bytes there is only the end.
            self.finish_acknowledged |= news > bytes;
            self.una = number;
            if before(self.next, number) {
                self.next = number;
            }
            (self.attempts, self.duplicates, self.careful) = (0, 0, false);
            match self.recover {
                Some(end) if before(number, end) => self.resend = true,
                _ => self.recover = None,
            }
            self.arm(now);
        }
        self.window = window;
        if window > 0 && self.next == self.una {
            (self.probe, self.careful, self.deadline) = (false, false, None);
        }
    }

    /// Has the timer run if something waits for an acknowledgement.
    fn arm(&mut self, now: Instant) {
        let waits = self.next != self.una;
        self.deadline = waits.then(|| now + RETRANSMIT * 2u32.pow(self.attempts.min(BACKOFF_MAX)));
    }

    /// Finds what is new in a segment.
    fn data<'a>(&mut self, sequence: u32, segment: &TcpRepr<'a>) -> Verdict<'a> {
        let end = segment.control == TcpControl::Fin;
        let length = segment.payload.len() as u32;
        if length == 0 && !end {
            // One that is out of place asks for where we are (keep-alives, RFC 9293, 3.8.4).
            self.acknowledge |= sequence != self.expected;
            return Verdict::Nothing;
        }
        self.acknowledge = true;
        let known = self.expected.wrapping_sub(sequence);
        // What is behind a gap comes again; what is known is so no more.
        if before(self.expected, sequence) || known > length || self.ended {
            return Verdict::Nothing;
        }
        Verdict::Data { bytes: &segment.payload[known as usize..], end }
    }

    /// `taken` bytes of a [`Verdict::Data`] have gone on, and its `end` if so.
    pub fn accept(&mut self, taken: usize, end: bool) {
        self.expected = self.expected.wrapping_add(taken as u32).wrapping_add(end.into());
        self.ended |= end;
    }

    /// Bytes have left `back`: tells the guest of the room, if that is worth a segment.
    pub fn drained(&mut self) {
        let room = self.right_edge().wrapping_sub(self.edge) as i32;
        let known = self.edge.wrapping_sub(self.expected) as i32;
        let worth = room > (self.limit / 2) as i32 || (known < i32::from(MSS) && room > i32::from(self.mss));
        self.acknowledge |= self.stage == Stage::Open && !self.ended && worth;
    }

    /// Behind what there is room for; it never moves back.
    fn right_edge(&self) -> u32 {
        let edge = self.expected.wrapping_add(self.limit.saturating_sub(self.back.len()) as u32);
        if before(edge, self.edge) { self.edge } else { edge }
    }

    /// The timer has run out: something is sent again. False if the guest is taken for gone.
    pub fn expire(&mut self, now: Instant) -> bool {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return true;
        }
        self.attempts += 1;
        let most = if self.stage == Stage::Open { ATTEMPTS } else { SYN_ATTEMPTS };
        if self.attempts > most {
            return false;
        }
        if self.stage == Stage::Open && self.next == self.una {
            self.probe = true;
        }
        (self.next, self.careful, self.recover, self.resend) = (self.una, true, None, false);
        self.deadline = Some(now + RETRANSMIT * 2u32.pow(self.attempts.min(BACKOFF_MAX)));
        true
    }

    /// The next segment to send, of at most `most` bytes of payload.
    pub fn next(&mut self, most: usize, now: Instant) -> Option<Segment> {
        match self.stage {
            Stage::Connecting => None,
            Stage::Accepting | Stage::Asking if self.next == self.una => Some(self.syn(now)),
            Stage::Accepting | Stage::Asking => None,
            Stage::Open => {
                let again = if std::mem::take(&mut self.resend) { self.again(most) } else { None };
                again.or_else(|| self.more(most, now))
            }
        }
    }

    fn syn(&mut self, now: Instant) -> Segment {
        let accepts = self.stage == Stage::Accepting;
        self.next = self.una.wrapping_add(1);
        self.top = self.next;
        self.arm(now);
        let scale = (!accepts || self.our_scale > 0).then_some(SCALE);
        let edge = self.limit.min(usize::from(u16::MAX)) as u16;
        self.edge = self.expected.wrapping_add(edge.into());
        Segment {
            control: TcpControl::Syn,
            sequence: self.una,
            acknowledgement: accepts.then_some(self.expected),
            window: edge,
            scale,
            mss: Some(MSS),
            offset: 0,
            length: 0,
            guest_mss: self.mss,
        }
    }

    /// What the guest seems to have lost.
    fn again(&mut self, most: usize) -> Option<Segment> {
        let sent = self.next.wrapping_sub(self.una) as usize;
        let length = sent.min(self.out.len()).min(most);
        let end = self.finished && length == self.out.len() && sent > length;
        (length > 0 || end).then(|| self.plain(self.una, 0, length, end))
    }

    fn more(&mut self, most: usize, now: Instant) -> Option<Segment> {
        let sent = self.next.wrapping_sub(self.una) as usize;
        let left = self.out.len().saturating_sub(sent);
        let usable = (self.window as usize).saturating_sub(sent);
        let usable = if self.probe && sent == 0 { usable.max(1) } else { usable };
        let usable = if self.careful && sent > 0 { 0 } else { usable };
        let mut length = left.min(usable).min(most);
        // Whole segments, unless it is all there is.
        if length < left && length > usize::from(self.mss) {
            length -= length % usize::from(self.mss);
        }
        let end = self.finished && length == left && sent <= self.out.len() && !self.finish_acknowledged;
        if length == 0 && !end {
            if left > 0 && sent == 0 && self.deadline.is_none() {
                // The window is closed: ask again, in case its opening is lost.
                self.deadline = Some(now + RETRANSMIT);
            }
            return self.acknowledge.then(|| self.plain(self.top, 0, 0, false));
        }
        let segment = self.plain(self.next, sent, length, end);
        self.next = self.next.wrapping_add(length as u32).wrapping_add(end.into());
        if before(self.top, self.next) {
            self.top = self.next;
        }
        if self.deadline.is_none() {
            self.arm(now);
        }
        Some(segment)
    }

    fn plain(&mut self, sequence: u32, offset: usize, length: usize, end: bool) -> Segment {
        self.acknowledge = false;
        self.edge = self.right_edge();
        let told = (self.edge.wrapping_sub(self.expected) >> self.our_scale).min(u16::MAX.into());
        self.edge = self.expected.wrapping_add(told << self.our_scale);
        let all = offset + length == self.out.len();
        Segment {
            control: match (end, length) {
                (true, _) => TcpControl::Fin,
                (false, 1..) if all => TcpControl::Psh,
                _ => TcpControl::None,
            },
            sequence,
            acknowledgement: Some(self.expected),
            window: told as u16,
            scale: None,
            mss: None,
            offset,
            length,
            guest_mss: self.mss,
        }
    }
}
