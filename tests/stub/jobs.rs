//! Every operation on random data, with what has to come out of it, computed in plain Rust.

use tp_rs::Result;
use tp_rs::comm::{Communicator, DType, Stream, Tensor};
use tp_rs::split::Split;

use super::Stub;
use super::common::{Matrix, cut, decode, encode, next, paste, sum_of};
use super::place::{Memory, Placed};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    AllReduce,
    Broadcast,
    Gather,
    AllGather,
    ReduceScatter,
    AddResidual,
}

impl Kind {
    pub(crate) const ALL: [Self; 6] = [
        Self::AllReduce,
        Self::Broadcast,
        Self::Gather,
        Self::AllGather,
        Self::ReduceScatter,
        Self::AddResidual,
    ];

    fn sums(self) -> bool {
        matches!(self, Self::AllReduce | Self::ReduceScatter | Self::AddResidual)
    }
}

/// One operation with its tensors.
#[derive(Clone, Debug)]
pub(crate) struct Order {
    pub(crate) kind: Kind,
    pub(crate) dtype: DType,
    pub(crate) rows: usize,
    pub(crate) dim: usize,
    /// Units of every rank, 0 for none.
    pub(crate) counts: Vec<u64>,
    /// Of each rank's tensors.
    pub(crate) memory: Vec<Memory>,
    /// Of the source of a broadcast or the target of a gather, in list calls.
    pub(crate) guest: Memory,
    /// A rank with nothing to add to an `all_reduce`. In rank calls it may still get the sum.
    pub(crate) silent: Option<usize>,
    pub(crate) receives: bool,
    pub(crate) seed: u64,
}

impl Order {
    /// Anything, of up to about `elements` elements.
    pub(crate) fn random(ranks: usize, elements: usize, mut seed: u64) -> Self {
        let mut below = |limit: usize| (next(&mut seed) % limit.max(1) as u64) as usize;
        let kind = Kind::ALL[below(6)];
        let dtype = loop {
            let dtype = DType::ALL[below(DType::ALL.len())];
            if dtype.can_sum() || !kind.sums() {
                break dtype;
            }
        };
        let rows = 1 + below(9);
        let dim = 1 + below((elements / rows / ranks / 2).max(1));
        let mut counts: Vec<u64> = (0..ranks).map(|_| below(4) as u64).collect();
        if counts.iter().all(|count| *count == 0) {
            counts[below(ranks)] = 1;
        }
        // All alike, or every rank's its own.
        let kinds = [Memory::Plain, Memory::Plain, Memory::Plain, Memory::Pool, Memory::Mapped];
        let memory = if below(2) == 0 {
            vec![kinds[below(5)]; ranks]
        } else {
            (0..ranks).map(|_| kinds[below(5)]).collect()
        };
        let guest = [Memory::Pinned, Memory::Pageable, Memory::Plain][below(3)];
        let silent = (kind == Kind::AllReduce && ranks > 1 && below(3) == 0).then(|| below(ranks));
        let receives = below(2) == 0;
        Self { kind, dtype, rows, dim, counts, memory, guest, silent, receives, seed: next(&mut seed) }
    }

    /// The same for rank calls, whose tensors are all on devices.
    pub(crate) fn on_devices(&self) -> Self {
        Self { guest: Memory::Plain, ..self.clone() }
    }

    fn split(&self) -> Split {
        Split::from_counts(&self.counts)
    }

    fn total(&self) -> usize {
        self.counts.iter().sum::<u64>() as usize * self.dim
    }

    fn width(&self, rank: usize) -> usize {
        self.counts[rank] as usize * self.dim
    }

    fn start(&self, rank: usize) -> usize {
        self.counts[..rank].iter().sum::<u64>() as usize * self.dim
    }

    /// Ranks that the split gives something.
    fn sharers(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.counts.len()).filter(|rank| self.counts[*rank] > 0)
    }
}

/// An order whose tensors are in their places.
pub(crate) struct Job {
    order: Order,
    split: Split,
    /// One a rank, or one for each of the split.
    inputs: Vec<Placed>,
    outputs: Vec<Placed>,
    guest: Option<Placed>,
    /// What comes of list calls and of rank calls.
    wanted: [Vec<Vec<u8>>; 2],
}

impl Job {
    /// `devices` has the device of every rank.
    pub(crate) fn new(stub: &'static Stub, devices: &[u32], order: &Order) -> Self {
        let mut seed = order.seed;
        let (dtype, rows, total) = (order.dtype, order.rows, order.total());
        let mut matrix = |columns: usize| Matrix::random(dtype, rows, columns, next(&mut seed));
        let place =
            |rank: usize, matrix: &Matrix| Placed::new(stub, devices[rank], order.memory[rank], matrix);
        let ranks = 0..devices.len();
        let wholes = |matrix: &mut dyn FnMut(usize) -> Matrix| -> Vec<Placed> {
            ranks.clone().map(|rank| place(rank, &matrix(total))).collect()
        };
        let parts = |matrix: &mut dyn FnMut(usize) -> Matrix| -> Vec<Placed> {
            order.sharers().map(|rank| place(rank, &matrix(order.width(rank)))).collect()
        };
        let (mut inputs, mut outputs, mut guest) = (Vec::new(), Vec::new(), None);
        match order.kind {
            Kind::AllReduce => outputs = wholes(&mut matrix),
            Kind::Broadcast => {
                outputs = wholes(&mut matrix);
                guest = Some(Placed::new(stub, devices[0], order.guest, &matrix(total)));
            }
            Kind::Gather => {
                inputs = parts(&mut matrix);
                guest = Some(Placed::new(stub, devices[0], order.guest, &matrix(total)));
            }
            Kind::AllGather => {
                inputs = parts(&mut matrix);
                outputs = wholes(&mut matrix);
            }
            Kind::ReduceScatter => {
                inputs = wholes(&mut matrix);
                outputs = parts(&mut matrix);
            }
            Kind::AddResidual => {
                inputs = order.sharers().map(|rank| place(rank, &matrix(total))).collect();
                outputs = parts(&mut matrix);
            }
        }
        let mut job = Self {
            order: order.clone(),
            split: order.split(),
            inputs,
            outputs,
            guest,
            wanted: [vec![], vec![]],
        };
        job.wanted = [job.wanted(false), job.wanted(true)];
        job
    }

    /// The elements of every output, and of the guest behind them where it is one.
    fn wanted(&self, by_ranks: bool) -> Vec<Vec<u8>> {
        let order = &self.order;
        let size = order.dtype.size();
        let all =
            |placed: &[Placed]| -> Vec<Matrix> { placed.iter().map(|one| one.before.clone()).collect() };
        let sum = |matrices: &[Matrix]| sum_of(&matrices.iter().collect::<Vec<_>>());
        let columns = |whole: &[u8], rank: usize| {
            cut(whole, order.total() * size, order.start(rank) * size, order.width(rank) * size)
        };
        let gathered = || {
            let mut whole = vec![0; order.rows * order.total() * size];
            for (rank, part) in order.sharers().zip(&self.inputs) {
                paste(&mut whole, order.total(), order.start(rank), &part.before);
            }
            whole
        };
        match order.kind {
            Kind::AllReduce => {
                let mut adding = all(&self.outputs);
                let silent = order.silent.map(|rank| (rank, adding.remove(rank)));
                let mut wanted = vec![sum(&adding); self.outputs.len()];
                if let Some((rank, before)) = silent
                    && !(by_ranks && order.receives)
                {
                    wanted[rank] = before.elements();
                }
                wanted
            }
            Kind::Broadcast => {
                vec![self.guest.as_ref().unwrap().before.elements(); self.outputs.len()]
            }
            Kind::Gather => vec![gathered()],
            Kind::AllGather => vec![gathered(); self.outputs.len()],
            Kind::ReduceScatter => {
                let whole = sum(&all(&self.inputs));
                order.sharers().map(|rank| columns(&whole, rank)).collect()
            }
            Kind::AddResidual => {
                let add = |((rank, target), source): ((usize, &Placed), &Placed)| {
                    let addend = columns(&source.before.elements(), rank);
                    let sums = decode(order.dtype, &target.before.elements());
                    let sums = sums.into_iter().zip(decode(order.dtype, &addend));
                    let add = |(left, right): (f64, f64)| match order.dtype {
                        DType::F64 => left + right,
                        _ => f64::from((left + right) as f32),
                    };
                    encode(order.dtype, &sums.map(add).collect::<Vec<_>>())
                };
                order.sharers().zip(&self.outputs).zip(&self.inputs).map(add).collect()
            }
        }
    }

    fn tensors(placed: &mut [Placed]) -> Vec<Tensor> {
        placed.iter_mut().map(Placed::tensor).collect()
    }

    /// The list call.
    pub(crate) fn list(&mut self, comm: &Communicator, streams: &[Stream]) -> Result<()> {
        let (inputs, outputs) = (Self::tensors(&mut self.inputs), Self::tensors(&mut self.outputs));
        let guest = self.guest.as_mut().map(Placed::tensor);
        let (split, dim) = (&self.split, self.order.dim as u64);
        let everyone = Split::from_counts(&vec![1; outputs.len()]);
        // SAFETY: the tensors live in their places until the streams are waited for.
        unsafe {
            match self.order.kind {
                Kind::AllReduce => {
                    let mut outputs = outputs;
                    if let Some(rank) = self.order.silent {
                        outputs[rank].rows = 0;
                    }
                    comm.all_reduce(&outputs, streams)
                }
                Kind::Broadcast => comm.broadcast(&guest.unwrap(), &outputs, streams),
                Kind::Gather => comm.gather(&inputs, split, dim, &guest.unwrap(), streams),
                Kind::AllGather => comm.all_gather(&inputs, split, &outputs, &everyone, dim, streams),
                Kind::ReduceScatter => comm.reduce_scatter(&inputs, &outputs, split, dim, streams),
                Kind::AddResidual => comm.add_residual(&outputs, &inputs, split, dim, streams),
            }
        }
    }

    /// The same as rank calls, one for each rank, to be made in any order. The guest is with rank 0.
    pub(crate) fn rank_calls(&mut self) -> Vec<RankCall<'_>> {
        let ranks = self.order.counts.len();
        let guest = self.guest.as_mut().map(Placed::tensor);
        let (inputs, outputs) = (Self::tensors(&mut self.inputs), Self::tensors(&mut self.outputs));
        let sharers: Vec<usize> = self.order.sharers().collect();
        let nothing = Tensor { rows: 0, ..guest.or(outputs.first().copied()).unwrap() };
        let shared = |tensors: &[Tensor], rank: usize| {
            sharers.iter().position(|sharer| *sharer == rank).map_or(nothing, |at| tensors[at])
        };
        let kind = self.order.kind;
        let call = |rank: usize| RankCall {
            kind,
            rank,
            receives: self.order.silent == Some(rank) && self.order.receives,
            split: &self.split,
            dim: self.order.dim as u64,
            input: match kind {
                Kind::Gather | Kind::AllGather | Kind::AddResidual => shared(&inputs, rank),
                Kind::ReduceScatter => inputs[rank],
                Kind::AllReduce => nothing,
                Kind::Broadcast => guest.unwrap(),
            },
            output: match kind {
                Kind::ReduceScatter | Kind::AddResidual => shared(&outputs, rank),
                Kind::Gather => guest.unwrap(),
                Kind::AllReduce if self.order.silent == Some(rank) && !self.order.receives => nothing,
                _ => outputs[rank],
            },
        };
        (0..ranks).map(call).collect()
    }

    /// Whether every output is what it should be. In rank calls the root of a broadcast has its own tensor only.
    pub(crate) fn verify(&mut self, by_ranks: bool) -> Result<(), String> {
        let skipped = usize::from(by_ranks && self.order.kind == Kind::Broadcast);
        let outputs = self.outputs.iter_mut().skip(skipped);
        let outputs = outputs.chain(self.guest.as_mut().filter(|_| self.order.kind == Kind::Gather));
        let wanted = &self.wanted[usize::from(by_ranks)];
        for (index, (output, wanted)) in outputs.zip(wanted.iter().skip(skipped)).enumerate() {
            let gaps = output.before.gaps();
            let now = output.now();
            if now.elements() != *wanted {
                let wrong = now.elements().iter().zip(wanted).filter(|(left, right)| left != right).count();
                return Err(format!("{wrong} of {} bytes of output {index} are wrong", wanted.len()));
            }
            if now.gaps() != gaps {
                return Err(format!("the gaps of output {index} were written"));
            }
        }
        Ok(())
    }

    /// Wants every float64 to be twice what it was, so many times: a sum of two ranks that is summed again.
    pub(crate) fn doubled(&mut self, times: i32) {
        for wanted in self.wanted.iter_mut().flatten() {
            let values = decode(DType::F64, wanted).into_iter();
            *wanted = encode(DType::F64, &values.map(|value| value * 2_f64.powi(times)).collect::<Vec<_>>());
        }
    }

    /// Puts back what the tensors held at first.
    pub(crate) fn reset(&mut self) {
        self.inputs.iter_mut().chain(&mut self.outputs).chain(self.guest.as_mut()).for_each(Placed::reset);
    }
}

/// One rank's part of a job.
pub(crate) struct RankCall<'a> {
    kind: Kind,
    pub(crate) rank: usize,
    receives: bool,
    split: &'a Split,
    dim: u64,
    input: Tensor,
    output: Tensor,
}

impl RankCall<'_> {
    pub(crate) fn make(&self, comm: &Communicator, stream: Stream) -> Result<()> {
        let Self { kind, rank, receives, split, dim, input, output } = self;
        // SAFETY: the tensors live in their places until the streams are waited for.
        unsafe {
            match kind {
                Kind::AllReduce if *receives => comm.rank_receive_sum(*rank, output, stream),
                Kind::AllReduce => comm.rank_all_reduce(*rank, output, stream),
                Kind::Broadcast if *rank == 0 => comm.rank_broadcast(0, 0, input, stream),
                Kind::Broadcast => comm.rank_broadcast(*rank, 0, output, stream),
                Kind::Gather => {
                    let target = (*rank == 0).then_some(output);
                    comm.rank_gather(*rank, 0, input, split, *dim, target, stream)
                }
                Kind::AllGather => comm.rank_all_gather(*rank, input, split, *dim, output, stream),
                Kind::ReduceScatter => comm.rank_reduce_scatter(*rank, input, output, split, *dim, stream),
                Kind::AddResidual => comm.rank_add_residual(*rank, output, input, split, *dim, stream),
            }
        }
    }
}
