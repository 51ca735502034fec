//! What is checked before a byte is touched. It knows no backend: the same checks stand before every one.

use super::operation::{Layout, Operation, Pair};
use super::refusal::Refusal;
use super::view::Tensor;
use crate::device::Device;

type Check = Result<(), Refusal>;

/// Checks that every rank asked for the same.
pub(crate) fn same_operation<'a>(mut asked: impl Iterator<Item = &'a Operation<'static>>) -> Check {
    let Some(first) = asked.next() else { return Ok(()) };
    for (index, other) in asked.enumerate() {
        if other != first {
            return Err(Refusal::new(
                format!("rank {}", index + 1),
                other,
                format!("{first}, as rank 0; every rank has to make the same calls in the same order"),
            ));
        }
    }
    Ok(())
}

/// Checks all that participants bring to an operation. `pairs` has one entry for each of `devices` and, in list
/// calls, one more for the caller.
pub(crate) fn together(operation: &Operation<'_>, pairs: &[Pair], devices: &[Device]) -> Check {
    let call = Call { operation, pairs, ranks: devices.len() };
    if let Some(layout) = operation.layout() {
        call.layout(layout)?;
    }
    if let Operation::Broadcast { root } | Operation::Gather { root, .. } = operation
        && *root >= pairs.len()
    {
        return Err(Refusal::new(call.name("root"), root, format!("a rank below {}", devices.len())));
    }
    for (index, pair) in pairs.iter().enumerate() {
        for (role, tensor) in [("input", &pair.input), ("output", &pair.output)] {
            if let Some(tensor) = tensor {
                call.tensor(index, role, tensor, devices.get(index))?;
            }
        }
    }
    call.dtypes()?;
    call.shapes()?;
    call.overlaps()
}

/// Checks what one rank can know of an operation: its own tensors. What ranks do not agree on is found by whoever
/// meets them.
#[cfg(feature = "cuda")]
pub(crate) fn alone(operation: &Operation<'_>, rank: usize, pair: &Pair, devices: &[Device]) -> Check {
    if rank >= devices.len() {
        return Err(Refusal::new("rank", rank, format!("a rank below {}", devices.len())));
    }
    let mut pairs = vec![Pair::default(); devices.len()];
    if let Some(place) = pairs.get_mut(rank) {
        *place = *pair;
    }
    let call = Call { operation, pairs: &pairs, ranks: devices.len() };
    if let Some(layout) = operation.layout() {
        call.layout(layout)?;
    }
    if let Operation::Broadcast { root } | Operation::Gather { root, .. } = operation
        && *root >= devices.len()
    {
        return Err(Refusal::new(call.name("root"), root, format!("a rank below {}", devices.len())));
    }
    for (role, tensor) in [("input", &pair.input), ("output", &pair.output)] {
        if let Some(tensor) = tensor {
            call.tensor(rank, role, tensor, devices.get(rank))?;
        }
    }
    call.dtypes()?;
    let rows = pair.gives().or(pair.gets()).map_or(0, |tensor| tensor.rows);
    let why = "as the split says, for as many rows as the rank's other tensor";
    match operation {
        Operation::Gather { root, layout, .. } => {
            if layout.width(rank) > 0 {
                call.shape(rank, "input", (rows, layout.width(rank)), why)?;
            } else {
                call.shape(rank, "input", (0, 0), "nothing: the split leaves this rank out")?;
            }
            if *root == rank {
                call.shape(rank, "output", (rows, layout.total()), why)?;
            } else {
                call.shape(rank, "output", (0, 0), &only_root(*root))?;
            }
        }
        Operation::AllGather { layout } => {
            let width = layout.width(rank);
            call.shape(rank, "input", if width > 0 { (rows, width) } else { (0, 0) }, why)?;
            if pair.gets().is_some() {
                call.shape(rank, "output", (rows, layout.total()), why)?;
            }
        }
        Operation::ReduceScatter { layout } => {
            if pair.gives().is_some() {
                call.shape(rank, "input", (rows, layout.total()), why)?;
            }
            call.shape(rank, "output", (rows, layout.width(rank)), why)?;
        }
        _ => {}
    }
    call.overlaps()
}

/// Why other ranks of a gather have no output.
fn only_root(root: usize) -> String {
    format!("nothing: rank {root} is the root, which alone gets anything")
}

struct Call<'a> {
    operation: &'a Operation<'a>,
    pairs: &'a [Pair],
    ranks: usize,
}

impl Call<'_> {
    fn name(&self, what: &str) -> String {
        format!("{}: {what}", self.operation.name())
    }

    fn who(&self, index: usize, role: &str) -> String {
        let name = self.operation.name();
        match role {
            "input" if index >= self.ranks => format!("{name}: source"),
            "output" if index >= self.ranks => format!("{name}: target"),
            _ => format!("{name}: {} of rank {index}", self.role(role)),
        }
    }

    /// The same as `who`, for the end of a sentence.
    fn whose(&self, index: usize, role: &str) -> String {
        match role {
            "input" if index >= self.ranks => "the source".into(),
            "output" if index >= self.ranks => "the target".into(),
            _ => format!("the {} of rank {index}", self.role(role)),
        }
    }

    /// Tensors that change in place are neither input nor output to the one who passed them.
    fn role<'b>(&self, role: &'b str) -> &'b str {
        if matches!(self.operation, Operation::AllReduce | Operation::Broadcast { .. }) {
            "tensor"
        } else {
            role
        }
    }

    fn layout(&self, layout: &Layout<'_>) -> Check {
        let refuse = |got: String, wanted: &str| Err(Refusal::new(self.name("split"), got, wanted));
        let mut end = 0;
        let mut previous: Option<usize> = None;
        for share in &layout.split.0 {
            let got = || format!("({}, {}, {})", share.rank, share.start, share.end);
            if share.rank >= self.ranks {
                return refuse(got(), &format!("ranks below {}", self.ranks));
            }
            if previous.is_some_and(|previous| previous >= share.rank) {
                return refuse(got(), "one interval a rank, in ascending order of ranks");
            }
            if share.start > end || share.end < end || share.end < share.start {
                return refuse(
                    got(),
                    &format!("an interval that starts at {end} or overlaps what is before it"),
                );
            }
            (previous, end) = (Some(share.rank), share.end);
        }
        let columns = end.checked_mul(layout.dim).and_then(|columns| usize::try_from(columns).ok());
        if columns.is_none() {
            return refuse(format!("{end} units of {} columns", layout.dim), "columns that fit 64 bits");
        }
        Ok(())
    }

    fn tensor(&self, index: usize, role: &str, tensor: &Tensor, device: Option<&Device>) -> Check {
        let refuse = |got: String, wanted: String| Err(Refusal::new(self.who(index, role), got, wanted));
        if tensor.is_empty() {
            return Ok(());
        }
        if let Some(device) = device
            && *device != tensor.device
        {
            return refuse(tensor.to_string(), format!("a tensor on {device}, where rank {index} is"));
        }
        if tensor.data == 0 {
            return refuse(format!("{tensor} at address 0"), "a tensor that has memory".into());
        }
        if !tensor.data.is_multiple_of(tensor.dtype.size()) {
            let wanted = format!("an address that is a multiple of {}", tensor.dtype.size());
            return refuse(format!("{tensor} at address {:#x}", tensor.data), wanted);
        }
        if tensor.rows > 1 && tensor.row_stride < tensor.columns {
            let wanted = format!("a row stride of {} or more: make the tensor contiguous", tensor.columns);
            return refuse(format!("{tensor} with a row stride of {}", tensor.row_stride), wanted);
        }
        if tensor.end().is_none() {
            let got = format!("{tensor} with a row stride of {}", tensor.row_stride);
            return refuse(got, "a size inside the address space".into());
        }
        if self.operation.sums() && !tensor.dtype.can_sum() {
            let wanted = "a float type: integers are only moved, because sums of them wrap around";
            return refuse(tensor.to_string(), wanted.into());
        }
        Ok(())
    }

    /// Every tensor with elements, with its owner and its role.
    fn present(&self) -> impl Iterator<Item = (usize, &'static str, &Tensor)> {
        self.pairs.iter().enumerate().flat_map(|(index, pair)| {
            let input = pair.gives().map(|tensor| (index, "input", tensor));
            let output = pair.gets().map(|tensor| (index, "output", tensor));
            input.into_iter().chain(output)
        })
    }

    fn dtypes(&self) -> Check {
        let mut present = self.present();
        let Some((first_index, first_role, first)) = present.next() else { return Ok(()) };
        for (index, role, tensor) in present {
            if tensor.dtype != first.dtype {
                let wanted = format!("{}, as {}", first.dtype, self.whose(first_index, first_role));
                return Err(Refusal::new(self.who(index, role), tensor, wanted));
            }
        }
        Ok(())
    }

    /// Checks that a tensor has `rows` rows and `columns` columns. `None` for a tensor is one without elements.
    fn shape(&self, index: usize, role: &str, (rows, columns): (usize, usize), why: &str) -> Check {
        let pair = self.pairs.get(index).copied().unwrap_or_default();
        let tensor = if role == "input" { pair.input } else { pair.output };
        let got = tensor.map_or((0, 0), |tensor| (tensor.rows, tensor.columns));
        let empty = |(rows, columns)| rows == 0 || columns == 0;
        if got == (rows, columns) || (empty((rows, columns)) && empty(got)) {
            return Ok(());
        }
        let got = tensor.map_or_else(|| "no tensor".into(), |tensor| tensor.to_string());
        Err(Refusal::new(self.who(index, role), got, format!("[{rows}, {columns}], {why}")))
    }

    fn shapes(&self) -> Check {
        match self.operation {
            Operation::Barrier => Ok(()),
            Operation::AllReduce => self.all_alike(),
            Operation::Broadcast { root } => self.broadcast(*root),
            Operation::Gather { root, layout, .. } => {
                let rows = self.parts(layout)?;
                let why = format!("the columns of all ranks ({layout}) for as many rows as their parts have");
                self.shape(*root, "output", (rows, layout.total()), &why)?;
                (0..self.ranks)
                    .filter(|index| index != root)
                    .try_for_each(|index| self.shape(index, "output", (0, 0), &only_root(*root)))
            }
            Operation::AllGather { layout } => {
                let rows = self.parts(layout)?;
                let why = format!("the columns of all ranks ({layout}) for as many rows as their parts have");
                self.every_output((rows, layout.total()), &why)
            }
            Operation::ReduceScatter { layout } => self.reduce_scatter(layout),
            Operation::AddResidual { layout } => self.add_residual(layout),
        }
    }

    /// All tensors have one shape, and at least one rank gives something if anybody wants something.
    fn all_alike(&self) -> Check {
        let mut present = self.present();
        let Some((first_index, first_role, first)) = present.next() else { return Ok(()) };
        let why = format!("as {}", self.whose(first_index, first_role));
        present
            .try_for_each(|(index, role, _)| self.shape(index, role, (first.rows, first.columns), &why))?;
        if self.pairs.iter().all(|pair| pair.gives().is_none()) {
            let got = "no rank that gives something";
            return Err(Refusal::new(self.name("tensors"), got, "at least one rank's part of the sum"));
        }
        Ok(())
    }

    fn broadcast(&self, root: usize) -> Check {
        let source = self.pairs.get(root).and_then(|pair| pair.input);
        let shape = source.map_or((0, 0), |source| (source.rows, source.columns));
        let why = format!("as {}", self.whose(root, "input"));
        self.every_output(shape, &why)
    }

    fn every_output(&self, shape: (usize, usize), why: &str) -> Check {
        let mut outputs = self.present().filter(|(_, role, _)| *role == "output");
        outputs.try_for_each(|(index, role, _)| self.shape(index, role, shape, why))
    }

    /// Checks every rank's part of a gathered tensor and returns their rows.
    fn parts(&self, layout: &Layout<'_>) -> Result<usize, Refusal> {
        let first = self.present().find(|(_, role, _)| *role == "input");
        let rows = first.map_or(0, |(_, _, part)| part.rows);
        for index in 0..self.ranks {
            let why = match first {
                Some((owner, _, _)) if owner != index => {
                    format!("its columns ({layout}) for as many rows as rank {owner} has")
                }
                _ => format!("its columns ({layout})"),
            };
            self.shape(index, "input", (rows, layout.width(index)), &why)?;
        }
        Ok(rows)
    }

    fn reduce_scatter(&self, layout: &Layout<'_>) -> Check {
        let first = self.present().find(|(_, role, _)| *role == "input");
        let rows = first.map_or(0, |(_, _, input)| input.rows);
        let why = format!("the columns of all ranks ({layout})");
        for (index, role, _) in self.present().filter(|(_, role, _)| *role == "input") {
            self.shape(index, role, (rows, layout.total()), &why)?;
        }
        for index in 0..self.ranks {
            let why = format!("its columns ({layout}) for as many rows as the inputs have");
            self.shape(index, "output", (rows, layout.width(index)), &why)?;
        }
        Ok(())
    }

    fn add_residual(&self, layout: &Layout<'_>) -> Check {
        for (index, pair) in self.pairs.iter().enumerate() {
            let width = layout.width(index);
            let given = [pair.output, pair.input].into_iter().flatten().find(|tensor| !tensor.is_empty());
            let rows = if width == 0 { 0 } else { given.map_or(0, |tensor| tensor.rows) };
            let why = format!("its columns ({layout})");
            self.shape(index, "output", (rows, width), &why)?;
            if rows > 0 {
                let why = format!("the columns of all ranks ({layout}) for as many rows as the target has");
                self.shape(index, "input", (rows, layout.total()), &why)?;
            }
        }
        Ok(())
    }

    /// No output shares memory with another tensor, unless it is the very tensor that it is made from.
    fn overlaps(&self) -> Check {
        for (owner, output) in self.pairs.iter().enumerate().filter_map(|(i, pair)| Some((i, pair.gets()?))) {
            for (index, role, other) in self.present() {
                let itself = index == owner && role == "output";
                let in_place = role == "input"
                    && other == output
                    && match self.operation {
                        Operation::AllReduce => index == owner,
                        Operation::Broadcast { .. } => true,
                        _ => false,
                    };
                if !itself && !in_place && output.overlaps(other) {
                    let got = format!("memory that {} uses too", self.whose(index, role));
                    return Err(Refusal::new(self.who(owner, "output"), got, "memory of its own"));
                }
            }
        }
        Ok(())
    }
}

impl std::fmt::Display for Layout<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shares = self.split.0.iter().map(|share| (share.rank, share.start, share.end));
        write!(f, "{:?} x {}", shares.collect::<Vec<_>>(), self.dim)
    }
}
