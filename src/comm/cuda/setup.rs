//! What a communicator owns on its devices: a record a rank, an inbox for each ordered pair of ranks, staging memory.

use super::kernels::Machine;
use super::layout::{INBOX_BYTES, LETTER_BYTES, MOST_RANKS, Rank, STOP_AT, Status, THREADS};
use crate::comm::options::Peers;
use crate::device::cuda::{Connections, DeviceMemory, PinnedMemory, Prover, connect, read, write};
use crate::error::Result;
use crate::split::activations::{STAGING_BYTES, pushed_area_bytes, pushed_bytes};

/// Blocks that stage, at most. While one waits for a fence or for a load from host memory, which take microseconds, none of
/// its data moves: so there are many with small chunks. Sixteen with chunks of 64 KiB were a tenth slower.
const STAGING_BLOCKS: usize = 64;
/// Bytes of one slot of staging memory, the largest chunk, where few blocks stage.
const MOST_SLOT_BYTES: usize = 64 << 10;
/// Bytes of the least chunk, of which a slot holds a number: 16 a thread.
const LEAST_CHUNK: usize = 16 * THREADS as usize;
/// Slots of a block. Three would do; with four a rank can run ahead of the others' latency.
const SLOTS: usize = 4;
/// Where the inboxes begin behind a rank's record.
const RECORD_BYTES: usize = LETTERS_AT + MOST_RANKS * 2 * LETTER_BYTES;
/// Where a rank counts the blocks of its copies to host memory.
const LEAVING_AT: usize = 640;
/// Where a rank's first block passes on the letters that come to host memory.
const LETTERS_AT: usize = 768;

/// The largest tensor that is pushed instead of pulled.
pub(super) fn small_bytes(ranks: usize) -> usize {
    usize::try_from(pushed_bytes(ranks)).unwrap_or(usize::MAX)
}

/// Bytes of the pieces that carry it.
fn area_bytes(ranks: usize) -> usize {
    usize::try_from(pushed_area_bytes(ranks)).unwrap_or(usize::MAX)
}

/// The memory of a communicator. Host memory is freed after the devices' because kernels may still look at it.
#[derive(Debug)]
pub(super) struct Rooms {
    _devices: Vec<DeviceMemory>,
    host: PinnedMemory,
    /// Address of every rank's record.
    pub(super) records: Vec<u64>,
    /// Whether all ranks reach each other's devices.
    pub(super) connected: bool,
    /// Whether there are two ranks of which neither reaches the other's device.
    pub(super) apart: bool,
    map: Map,
    host_bases: Vec<u64>,
}

/// Where something is.
#[derive(Debug, Clone, Copy, Default)]
struct Place {
    /// In the memory of the rank that it belongs to, else in the host's.
    with_owner: bool,
    at: usize,
}

/// Where everything is.
#[derive(Debug)]
struct Map {
    status_at: usize,
    stop_at: usize,
    copied_at: usize,
    /// Where every reader, in turn, reads what each writer brings; it belongs to the reader.
    inboxes: Vec<Place>,
    stages: Vec<Place>,
    own_bytes: Vec<usize>,
    host_bytes: usize,
}

impl Map {
    fn inbox(&self, ranks: usize, writer: usize, reader: usize) -> Place {
        self.inboxes.get(reader * ranks + writer).copied().unwrap_or_default()
    }
}

/// Gives out places in a block of memory that is not there yet.
struct Places {
    bytes: usize,
}

impl Places {
    fn take(&mut self, bytes: usize) -> usize {
        let at = self.bytes;
        self.bytes = (at + bytes).next_multiple_of(256);
        at
    }
}

/// Which machine every rank is on.
pub(super) struct Seats<'a> {
    pub(super) machines: &'a [Machine],
    pub(super) of: &'a [usize],
}

impl Rooms {
    /// Proves which devices reach each other and lays everything out. `blocks` is the most that a rank uses.
    pub(super) fn new(seats: &Seats<'_>, peers: Peers, blocks: usize) -> Result<Self> {
        let ranks = seats.of.len();
        let provers: Vec<_> = seats
            .machines
            .iter()
            .map(|machine| Prover {
                context: machine.context(),
                stream: &machine.stream,
                module: &machine.kernels.module,
                write: machine.kernels.write_pattern,
                check: machine.kernels.check_pattern,
            })
            .collect();
        let connections = match peers {
            Peers::Proved | Peers::OneWay => Some(connect(&provers, false)?),
            Peers::Lying => Some(connect(&provers, true)?),
            Peers::Staged => None,
        };
        let one_way = peers == Peers::OneWay;
        let plan = Plan { seats, connections, one_way, ranks, area: area_bytes(ranks), blocks };
        plan.build()
    }

    /// What a rank's kernels said last.
    pub(super) fn status(&self, rank: usize) -> Status {
        let words = size_of::<Status>() / size_of::<u32>();
        let word =
            |index: usize| self.host.word(self.map.status_at / size_of::<u32>() + rank * words + index);
        // A kernel writes the state last.
        let state = word(0);
        if state == 0 {
            return Status::default();
        }
        Status { state, sequence: word(1), missing: word(2), signature: word(3) }
    }

    /// Where a rank's copies count their blocks, and the word that they write when done, as its device sees it.
    pub(super) fn copied_places(&self, rank: usize) -> (u64, u64) {
        let record = self.records.get(rank).copied().unwrap_or(0);
        let host = self.host_bases.get(rank).copied().unwrap_or(0);
        (record + LEAVING_AT as u64, host + (self.map.copied_at + rank * size_of::<u32>()) as u64)
    }

    /// What a rank's last copy wrote.
    pub(super) fn copied(&self, rank: usize) -> u32 {
        self.host.word(self.map.copied_at / size_of::<u32>() + rank)
    }

    /// Clears what a failed operation left, so that the next one is a new one for all ranks. No kernel may run.
    pub(super) fn renew(&self, seats: &Seats<'_>) -> Result<()> {
        let state_at = |record: &u64| record + (size_of::<Rank>() - size_of::<[u32; 4]>()) as u64;
        let machine = |rank: usize| seats.of.get(rank).and_then(|seat| seats.machines.get(*seat));
        let mut last = 0;
        for (rank, record) in self.records.iter().enumerate() {
            let Some(machine) = machine(rank) else { continue };
            let mut state = [0_u32; 4];
            read(machine.context(), &machine.stream, state_at(record), &mut state)?;
            last = last.max(u64::from(state[1]) << 32 | u64::from(state[0]));
        }
        // The failed operation has the number after the last. What some ranks wrote for it must be nobody's.
        let [low, high] = [(last + 2) & u64::from(u32::MAX), (last + 2) >> 32];
        let state = [u32::try_from(low).unwrap_or(0), u32::try_from(high).unwrap_or(0), 0, 0];
        for (rank, record) in self.records.iter().enumerate() {
            let Some(machine) = machine(rank) else { continue };
            // SAFETY: the record ends with these words.
            unsafe { write(machine.context(), &machine.stream, state_at(record), &state)? };
        }
        let ranks = self.records.len();
        for (pair, inbox) in
            self.map.inboxes.iter().enumerate().filter(|(pair, _)| pair / ranks != pair % ranks)
        {
            let (reader, at) = (pair / ranks, inbox.at + STOP_AT);
            match (inbox.with_owner, self.records.get(reader), machine(reader)) {
                // SAFETY: the inbox, which lies behind the reader's record, has the word there.
                (true, Some(record), Some(machine)) => unsafe {
                    write(machine.context(), &machine.stream, record + at as u64, &0_u32)?;
                },
                _ => self.host.set_word(at / size_of::<u32>(), 0),
            }
        }
        let words = self.records.len() * size_of::<Status>() / size_of::<u32>();
        for word in 0..words {
            self.host.set_word(self.map.status_at / size_of::<u32>() + word, 0);
        }
        self.host.set_word(self.map.stop_at / size_of::<u32>(), 0);
        Ok(())
    }

    /// Ends all waits of kernels.
    pub(super) fn stop(&self) {
        self.host.set_word(self.map.stop_at / size_of::<u32>(), 1);
    }
}

struct Plan<'a> {
    seats: &'a Seats<'a>,
    connections: Option<Connections>,
    /// Whether ranks reach only those after them.
    one_way: bool,
    ranks: usize,
    area: usize,
    blocks: usize,
}

impl Plan<'_> {
    fn reaches(&self, from: usize, to: usize) -> bool {
        if self.one_way && from > to {
            return false;
        }
        let (Some(&from), Some(&to)) = (self.seats.of.get(from), self.seats.of.get(to)) else { return false };
        self.connections.as_ref().is_some_and(|connections| connections.reaches(from, to))
    }

    fn connected(&self) -> bool {
        (0..self.ranks).all(|from| (0..self.ranks).all(|to| self.reaches(from, to)))
    }

    fn apart(&self) -> bool {
        self.ranks == 2 && !self.reaches(0, 1) && !self.reaches(1, 0)
    }

    fn machine(&self, rank: usize) -> Option<&Machine> {
        self.seats.of.get(rank).and_then(|seat| self.seats.machines.get(*seat))
    }

    /// A bit for each rank of which `what` is true.
    fn mask(&self, what: impl Fn(usize) -> bool) -> u16 {
        (0..self.ranks).filter(|peer| what(*peer)).fold(0, |bits, peer| bits | 1 << peer)
    }

    fn staging_blocks(&self) -> usize {
        self.blocks.min(STAGING_BLOCKS)
    }

    /// Bytes of a slot: so many that a rank's slots fill what plans count for them.
    fn slot_bytes(&self) -> usize {
        let slots = self.staging_blocks() * SLOTS;
        let fair = usize::try_from(STAGING_BYTES).unwrap_or(usize::MAX) / slots.max(1);
        (fair / LEAST_CHUNK * LEAST_CHUNK).clamp(LEAST_CHUNK, MOST_SLOT_BYTES)
    }

    /// Says where everything will be.
    fn lay_out(&self) -> Map {
        let ranks = self.ranks;
        let inbox = INBOX_BYTES + 2 * self.area;
        let stage = if ranks > 1 { self.staging_blocks() * SLOTS * self.slot_bytes() } else { 0 };
        let mut host = Places { bytes: 0 };
        let mut map = Map {
            status_at: host.take(ranks * size_of::<Status>()),
            stop_at: host.take(4),
            copied_at: host.take(ranks * 4),
            inboxes: Vec::with_capacity(ranks * ranks),
            stages: Vec::with_capacity(ranks),
            own_bytes: Vec::with_capacity(ranks),
            host_bytes: 0,
        };
        for reader in 0..ranks {
            let mut own = Places { bytes: RECORD_BYTES };
            for writer in 0..ranks {
                let with_reader = self.reaches(writer, reader);
                let bytes = if writer == reader { 0 } else { inbox };
                let at = if with_reader { own.take(bytes) } else { host.take(bytes) };
                map.inboxes.push(Place { with_owner: with_reader, at });
            }
            let here = (0..ranks).all(|peer| self.reaches(peer, reader));
            let at = if here { own.take(stage) } else { host.take(stage) };
            map.stages.push(Place { with_owner: here, at });
            map.own_bytes.push(own.bytes);
        }
        map.host_bytes = host.bytes;
        map
    }

    /// A rank's record. `bases` are the addresses of all ranks' memory, `host` that of the host's for this rank.
    fn record(&self, rank: usize, map: &Map, bases: &[u64], host: u64) -> Rank {
        let base = |rank: usize| bases.get(rank).copied().unwrap_or(0);
        let place = |place: Place, owner: usize| {
            let start = if place.with_owner { base(owner) } else { host };
            start + place.at as u64
        };
        let mut record = Rank {
            index: u32::try_from(rank).unwrap_or(0),
            ranks: u32::try_from(self.ranks).unwrap_or(0),
            slot_bytes: u32::try_from(self.slot_bytes()).unwrap_or(0),
            slots: u32::try_from(SLOTS).unwrap_or(0),
            area_bytes: self.area as u64,
            out: [0; MOST_RANKS],
            inboxes: [0; MOST_RANKS],
            stage: [0; MOST_RANKS],
            seen: [0; MOST_RANKS],
            status: host + (map.status_at + rank * size_of::<Status>()) as u64,
            stop: host + map.stop_at as u64,
            reaches: self.mask(|peer| self.reaches(rank, peer)),
            reached: self.mask(|peer| self.reaches(peer, rank)),
            connected: u16::from(self.connected()),
            staging_blocks: u16::try_from(self.staging_blocks()).unwrap_or(1),
            state: [0; 4],
        };
        let peers =
            record.out.iter_mut().zip(&mut record.inboxes).zip(&mut record.stage).zip(&mut record.seen);
        for (peer, (((out, inbox), stage), seen)) in peers.enumerate().take(self.ranks) {
            *stage = place(map.stages.get(peer).copied().unwrap_or_default(), peer);
            if peer == rank {
                continue;
            }
            let back = map.inbox(self.ranks, peer, rank);
            *out = place(map.inbox(self.ranks, rank, peer), peer);
            *inbox = place(back, rank);
            // An inbox begins with the letters.
            let passed_on = base(rank) + (LETTERS_AT + peer * 2 * LETTER_BYTES) as u64;
            *seen = if back.with_owner { *inbox } else { passed_on };
        }
        record
    }

    fn build(&self) -> Result<Rooms> {
        let map = self.lay_out();
        let Some(first) = self.seats.machines.first() else {
            return Err(crate::error::Error::invalid("devices", "none", "one a rank"));
        };
        let host = PinnedMemory::zeroed(first.context(), map.host_bytes)?;
        let mut devices = Vec::with_capacity(self.ranks);
        for (rank, bytes) in map.own_bytes.iter().enumerate() {
            if let Some(machine) = self.machine(rank) {
                let memory = DeviceMemory::zeroed(machine.context(), *bytes, &machine.stream);
                devices.push(memory.map_err(|error| error.of_rank(rank))?);
            }
        }
        let bases: Vec<u64> = devices.iter().map(DeviceMemory::address).collect();
        let mut host_bases = Vec::with_capacity(self.ranks);
        for (rank, base) in bases.iter().enumerate() {
            let Some(machine) = self.machine(rank) else { continue };
            let host_base = host.address(machine.context()).map_err(|error| error.of_rank(rank))?;
            host_bases.push(host_base);
            let record = self.record(rank, &map, &bases, host_base);
            // SAFETY: the rank's memory begins with room for its record.
            unsafe { write(machine.context(), &machine.stream, *base, &record) }
                .map_err(|error| error.of_rank(rank))?;
        }
        let (connected, apart) = (self.connected(), self.apart());
        Ok(Rooms { _devices: devices, host, records: bases, connected, apart, map, host_bases })
    }
}
