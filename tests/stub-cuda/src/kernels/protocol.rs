//! How ranks meet, as cuda/protocol.cuh has it.

use std::mem::offset_of;
use std::time::{Duration, Instant};

use super::eye::Eye;
use crate::codes::Result;
use crate::faults::stall;
use crate::layout::{
    Call, DISAGREED, GETS, GIVES, INBOX_BYTES, LETTER_BYTES, Member, PLAIN, Rank, STOP_AT, Status, TIMED_OUT,
    TOLD_BY_PEER,
};
use crate::report::violation;

const TOLD_BY_HOST: u32 = 4;
// Inside of an inbox: letters of even and odd operations, the flag of the end, the stop word, then a flag of a line for
// each staging block, three times.
const LETTER: u64 = LETTER_BYTES as u64;
const LINE: u64 = 128;
const FINISHED: u64 = 2 * LETTER;
const STOP: u64 = FINISHED + LINE;
const STAGED: u64 = STOP + LINE;
const CONSUMED: u64 = STAGED + LINE * STAGING_BLOCKS;
const SUMMED: u64 = CONSUMED + LINE * STAGING_BLOCKS;
const STAGING_BLOCKS: u64 = 64;
const _: () = assert!(STOP == STOP_AT as u64 && SUMMED + LINE * STAGING_BLOCKS == INBOX_BYTES as u64);

/// A peer of the running operation.
#[derive(Clone, Copy, Default)]
pub(super) struct Peer {
    pub(super) data: u64,
    pub(super) stride: u64,
    pub(super) role: u32,
}

/// One operation as one block of one rank sees it.
pub(super) struct Meeting {
    pub(super) sequence: u64,
    pub(super) peers: Vec<Peer>,
}

impl Meeting {
    fn role(&self, peer: usize) -> u32 {
        self.peers.get(peer).map_or(0, |peer| peer.role)
    }

    pub(super) fn present(&self, peer: usize) -> bool {
        self.role(peer) & (GIVES | GETS) != 0
    }

    pub(super) fn gives(&self, peer: usize) -> bool {
        self.role(peer) & GIVES != 0
    }

    pub(super) fn gets(&self, peer: usize) -> bool {
        self.role(peer) & GETS != 0
    }

    pub(super) fn about(&self, peer: usize) -> Peer {
        self.peers.get(peer).copied().unwrap_or_default()
    }

    /// Whether peers with access to the rank's device can use its tensors.
    pub(super) fn plain(&self, peer: usize) -> bool {
        self.role(peer) & PLAIN != 0
    }
}

/// One member of a launch.
pub(super) struct Seat<'a> {
    pub(super) eye: Eye,
    pub(super) call: &'a Call,
    pub(super) me: Member,
    pub(super) rank: Rank,
    pub(super) blocks: u32,
}

/// A list's entry for a peer.
pub(super) fn entry<T: Copy + Default>(list: &[T], peer: usize) -> T {
    list.get(peer).copied().unwrap_or_default()
}

impl<'a> Seat<'a> {
    /// Reads the rank's record.
    pub(super) fn take(device: u32, call: &'a Call, index: u32, blocks: u32) -> Result<Self> {
        let eye = Eye(device);
        let me = entry(&call.members, index as usize);
        let mut bytes = [0; size_of::<Rank>()];
        eye.read(me.rank, &mut bytes, 8)?;
        // SAFETY: a structure of numbers, read from as many bytes.
        let rank = unsafe { bytes.as_ptr().cast::<Rank>().read_unaligned() };
        // Kernels begin with these, before the record has come.
        let told = (me.index, call.ranks);
        if me.role & (GIVES | GETS) != 0 && told != (rank.index, rank.ranks) {
            violation(format!(
                "a launch says rank and ranks are {told:?}, its record {} and {}",
                rank.index, rank.ranks
            ));
        }
        Ok(Self { eye, call, me, rank, blocks })
    }

    pub(super) fn ranks(&self) -> usize {
        self.rank.ranks as usize
    }

    pub(super) fn index(&self) -> usize {
        self.rank.index as usize
    }

    pub(super) fn gives(&self) -> bool {
        self.me.role & GIVES != 0
    }

    pub(super) fn gets(&self) -> bool {
        self.me.role & GETS != 0
    }

    pub(super) fn width(&self, peer: usize) -> u64 {
        u64::from(entry(&self.call.end, peer).saturating_sub(entry(&self.call.begin, peer)))
    }

    pub(super) fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let me = self.index();
        (0..self.ranks()).filter(move |peer| *peer != me)
    }

    /// Memory that this rank writes and `peer` reads.
    pub(super) fn out(&self, peer: usize) -> u64 {
        entry(&self.rank.out, peer)
    }

    /// Memory that `peer` writes and this rank reads.
    pub(super) fn inbox(&self, peer: usize) -> u64 {
        entry(&self.rank.inboxes, peer)
    }

    fn state(&self, word: u64) -> u64 {
        self.me.rank + offset_of!(Rank, state) as u64 + 4 * word
    }

    /// Operations that are done.
    pub(super) fn sequence(&self) -> Result<u64> {
        self.eye.load64(self.state(0))
    }

    fn broken(&self) -> Result<bool> {
        Ok(self.eye.load32(self.state(3))? != 0)
    }

    /// Marks the rank as stopped and says why, once; tells the peers.
    fn stop(&self, state: u32, missing: u32) -> Result {
        if self.eye.swap32(self.state(3), 1)? != 0 {
            return Ok(());
        }
        let status = self.rank.status;
        let sequence = self.sequence()? as u32 + 1;
        self.eye.store32(status + offset_of!(Status, sequence) as u64, sequence)?;
        self.eye.store32(status + offset_of!(Status, missing) as u64, missing)?;
        self.eye.store32(status + offset_of!(Status, signature) as u64, self.call.signature)?;
        self.eye.store32(status + offset_of!(Status, state) as u64, state)?;
        stall();
        self.others().try_for_each(|peer| self.eye.store32(self.out(peer) + STOP, 1))
    }

    /// The ranks whose letters of the running operation are not there.
    fn absent(&self) -> Result<u32> {
        let sequence = self.sequence()? as u32 + 1;
        let mut missing = 0;
        for peer in self.others() {
            let letter = self.inbox(peer) + u64::from(sequence & 1) * LETTER;
            if (self.eye.load64(letter)? >> 32) as u32 != sequence {
                missing |= 1 << peer;
            }
        }
        Ok(missing)
    }

    /// Looks until `there` finds something or waiting for `peer` has to end: then `None`.
    pub(super) fn wait<T>(&self, peer: usize, there: impl Fn() -> Result<Option<T>>) -> Result<Option<T>> {
        let mut since = None;
        for look in 0_u64.. {
            if let Some(found) = there()? {
                return Ok(Some(found));
            }
            if look < 100 {
                std::thread::yield_now();
                continue;
            }
            std::thread::sleep(Duration::from_micros(30));
            self.eye.alive()?;
            if self.broken()? {
                break;
            }
            if self.eye.load32(self.rank.stop)? != 0 {
                self.stop(TOLD_BY_HOST, 0)?;
                break;
            }
            if self.eye.load32(self.inbox(peer) + STOP)? != 0 {
                self.stop(TOLD_BY_PEER, 1 << peer)?;
                break;
            }
            let since = since.get_or_insert_with(Instant::now);
            if since.elapsed() >= Duration::from_nanos(self.call.timeout) {
                self.stop(TIMED_OUT, self.absent()? | 1 << peer)?;
                break;
            }
        }
        Ok(None)
    }

    /// Waits until a word of 8 bytes that `peer` writes has come to `least`.
    pub(super) fn wait_for(&self, flag: u64, least: u64, peer: usize) -> Result<bool> {
        let there = || Ok((self.eye.load64(flag)? >= least).then_some(()));
        Ok(self.wait(peer, there)?.is_some())
    }

    /// Two words that `peer` writes, each beside the sequence number.
    pub(super) fn receive(&self, at: u64, sequence: u32, peer: usize) -> Result<Option<(u32, u32)>> {
        self.wait(peer, || {
            let (low, high) = (self.eye.load64(at)?, self.eye.load64(at + 8)?);
            let fresh = (low >> 32) as u32 == sequence && (high >> 32) as u32 == sequence;
            Ok(fresh.then_some((low as u32, high as u32)))
        })
    }

    pub(super) fn send(&self, at: u64, sequence: u32, (low, high): (u32, u32)) -> Result {
        let beside = u64::from(sequence) << 32;
        self.eye.store64(at, u64::from(low) | beside)?;
        self.eye.store64(at + 8, u64::from(high) | beside)
    }

    /// Address and stride of what the rank brings.
    fn own(&self) -> Peer {
        let (data, stride) = if self.gives() {
            (self.me.input, self.me.input_stride)
        } else {
            (self.me.output, self.me.output_stride)
        };
        Peer { data, stride, role: self.me.role }
    }

    /// Writes this rank's letters and gives the number of the operation.
    pub(super) fn announce(&self, addresses: bool) -> Result<u64> {
        let whole = self.sequence()? + 1;
        let sequence = whole as u32;
        let own = self.own();
        for peer in self.others() {
            stall();
            let letter = self.out(peer) + (whole & 1) * LETTER;
            self.send(letter, sequence, (self.call.signature, own.role))?;
            if addresses {
                self.send(letter + 16, sequence, (own.data as u32, (own.data >> 32) as u32))?;
                self.send(letter + 32, sequence, (own.stride as u32, (own.stride >> 32) as u32))?;
            }
        }
        Ok(whole)
    }

    /// Whether both this rank and a peer bring something.
    fn both_bring(&self, role: u32) -> bool {
        let brings = |role: u32| role & (GIVES | GETS) != 0;
        brings(role) && brings(self.me.role)
    }

    /// Whether a peer that brings something made the same call. A rank that only comes need not have.
    fn agrees(&self, peer: usize, (signature, role): (u32, u32)) -> Result<bool> {
        if !self.both_bring(role) || signature == self.call.signature {
            return Ok(true);
        }
        self.stop(DISAGREED, 1 << peer)?;
        Ok(false)
    }

    /// Waits for the first part of a peer's letter and, with `addresses`, for the others, which small sums don't write and
    /// ranks that only come don't need. What is read is passed on to where the other blocks look for it. `None`: leave at
    /// once.
    pub(super) fn read_letter(
        &self,
        sequence: u32,
        peer: usize,
        addresses: bool,
    ) -> Result<Option<[(u32, u32); 3]>> {
        let place = u64::from(sequence & 1) * LETTER;
        let (own, seen) = (self.inbox(peer) + place, entry(&self.rank.seen, peer) + place);
        let mut letter = [(0, 0); 3];
        for part in 0..3 {
            let offset = 16 * part as u64;
            let Some(received) = self.receive(own + offset, sequence, peer)? else { return Ok(None) };
            if seen != own {
                self.send(seen + offset, sequence, received)?;
                // The other blocks find the same.
                if self.receive(seen + offset, sequence, peer)? != Some(received) {
                    return Ok(None);
                }
            }
            if let Some(words) = letter.get_mut(part) {
                *words = received;
            }
            let [what, ..] = letter;
            if part == 0 && !self.agrees(peer, what)? {
                return Ok(None);
            }
            if !addresses || !self.both_bring(what.1) {
                break;
            }
        }
        Ok(Some(letter))
    }

    /// Whether the rank has not stopped.
    pub(super) fn alive(&self) -> Result<bool> {
        Ok(!self.broken()?)
    }

    /// Waits for all letters. `None`: leave at once.
    pub(super) fn meet(&self, whole: u64) -> Result<Option<Meeting>> {
        let mut alive = self.alive()?;
        let mut peers = vec![Peer::default(); self.ranks()];
        for (peer, about) in peers.iter_mut().enumerate() {
            if peer == self.index() {
                *about = self.own();
                continue;
            }
            let Some([what, data, stride]) = self.read_letter(whole as u32, peer, true)? else {
                alive = false;
                continue;
            };
            about.data = u64::from(data.0) | u64::from(data.1) << 32;
            about.stride = u64::from(stride.0) | u64::from(stride.1) << 32;
            about.role = what.1;
        }
        Ok(alive.then_some(Meeting { sequence: whole, peers }))
    }

    /// Ends an operation: with a meeting, waits until no peer needs this rank's memory any more and all that peers
    /// write here has been written; then counts it.
    pub(super) fn leave(&self, sequence: u64, meeting: Option<&Meeting>) -> Result {
        stall();
        let present = |peer: &usize| meeting.is_some_and(|meeting| meeting.present(*peer));
        for peer in self.others().filter(present) {
            self.eye.store64(self.out(peer) + FINISHED, sequence)?;
        }
        for peer in self.others().filter(present) {
            self.wait_for(self.inbox(peer) + FINISHED, sequence, peer)?;
        }
        self.eye.store64(self.state(0), sequence)
    }

    /// Whether every rank uses every other's tensors where they are.
    pub(super) fn all_direct(&self, meeting: &Meeting) -> bool {
        let plain = |peer| !meeting.present(peer) || meeting.plain(peer);
        self.rank.connected != 0 && (0..self.ranks()).all(plain)
    }

    /// Whether this rank uses the peer's tensors where they are.
    pub(super) fn direct(&self, meeting: &Meeting, peer: usize) -> bool {
        peer == self.index() || (self.rank.reaches >> peer & 1 != 0 && meeting.plain(peer))
    }

    /// Whether the peer uses this rank's tensors where they are.
    pub(super) fn seen_by(&self, peer: usize) -> bool {
        peer == self.index() || (self.rank.reached >> peer & 1 != 0 && self.me.role & PLAIN != 0)
    }

    /// Announces, meets, works and parts. `direct` is the work on tensors where they are, which the first block does for
    /// all of them; `staged` is a block's, done by one after another.
    /// With `always`, what is direct is done also where some is staged.
    pub(super) fn together(
        &mut self,
        always: bool,
        direct: impl Fn(&Self, &Meeting) -> Result,
        staged: impl Fn(&Self, &Meeting, u32) -> Result<bool>,
    ) -> Result {
        let sequence = self.announce(true)?;
        let meeting = self.meet(sequence)?;
        let mut done = None;
        if let Some(meeting) = &meeting
            && self.me.role & (GIVES | GETS) != 0
        {
            stall();
            let all_direct = self.all_direct(meeting);
            if all_direct || always {
                direct(self, meeting)?;
            }
            let mut whole = true;
            for block in 0..self.blocks {
                whole = whole && (all_direct || staged(self, meeting, block)?);
            }
            done = whole.then_some(meeting);
        }
        self.leave(sequence, done)
    }

    /// Where a block's flag for summed chunks is in an inbox.
    pub(super) fn summed_flag(inbox: u64, block: u32) -> u64 {
        inbox + SUMMED + LINE * u64::from(block)
    }

    /// Where a block's flag for staged chunks is in an inbox.
    pub(super) fn staged_flag(inbox: u64, block: u32) -> u64 {
        inbox + STAGED + LINE * u64::from(block)
    }

    /// Where a block's flag for consumed chunks is in an inbox.
    pub(super) fn consumed_flag(inbox: u64, block: u32) -> u64 {
        inbox + CONSUMED + LINE * u64::from(block)
    }
}
