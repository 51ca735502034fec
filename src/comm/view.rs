//! A tensor as the communicator sees it: an address, a type and two dimensions.

use super::dtype::DType;
use crate::device::Device;

/// A raw view of a tensor's memory as rows of adjacent elements.
///
/// It owns nothing and borrows nothing; whoever passes it to a call answers for the memory (see the call's
/// `# Safety`). A tensor of more dimensions is seen with all but its last as rows. A tensor without elements
/// (no rows or no columns) may have any address, also 0: its rank joins the call and has nothing to give or
/// to get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tensor {
    /// Address of the first element.
    pub data: usize,
    /// Where the memory is.
    pub device: Device,
    /// The elements' type.
    pub dtype: DType,
    /// Rows.
    pub rows: usize,
    /// Elements of a row; they lie side by side.
    pub columns: usize,
    /// Elements from the start of one row to the start of the next; no fewer than `columns`, unless there is
    /// only one row.
    pub row_stride: usize,
}

impl Tensor {
    /// A view of rows that follow each other without gaps.
    #[must_use]
    pub fn dense(data: usize, device: Device, dtype: DType, rows: usize, columns: usize) -> Self {
        Self { data, device, dtype, rows, columns, row_stride: columns }
    }

    /// A view of a slice in host memory as one row.
    #[must_use]
    pub fn of_slice<T>(slice: &mut [T], dtype: DType) -> Self {
        let elements = std::mem::size_of_val(slice) / dtype.size();
        Self::dense(slice.as_mut_ptr().expose_provenance(), Device::Cpu, dtype, 1, elements)
    }

    /// Whether there is no element.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows == 0 || self.columns == 0
    }

    /// Whether the rows follow each other without gaps.
    #[must_use]
    pub fn is_dense(&self) -> bool {
        self.rows <= 1 || self.row_stride == self.columns
    }

    /// One past the last byte; `None` where that is beyond the address space.
    pub(crate) fn end(&self) -> Option<usize> {
        if self.is_empty() {
            return Some(self.data);
        }
        let elements = (self.rows - 1).checked_mul(self.row_stride)?.checked_add(self.columns)?;
        let end = self.data.checked_add(elements.checked_mul(self.dtype.size())?)?;
        // No allocation is larger, and pointer offsets are signed.
        isize::try_from(end - self.data).is_ok().then_some(end)
    }

    /// Bytes of a row's elements. No overflow once [`Tensor::end`] is known.
    fn row_bytes(&self) -> usize {
        self.columns * self.dtype.size()
    }

    /// Bytes from row to row; a single row reaches to its own end.
    fn stride_bytes(&self) -> usize {
        if self.rows == 1 { self.row_bytes() } else { self.row_stride * self.dtype.size() }
    }

    /// Whether a byte belongs to both. Columns of one buffer that lie beside each other do not overlap.
    ///
    /// Both have to be checked tensors: their ends are inside the address space.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        let (Some(self_end), Some(other_end)) = (self.end(), other.end()) else { return true };
        if self.is_empty() || other.is_empty() || self_end <= other.data || other_end <= self.data {
            return false;
        }
        if self.is_dense() && other.is_dense() {
            return true;
        }
        // Row by row through both, always on with the row that ends first.
        let (mut row, mut other_row) = (0, 0);
        while row < self.rows && other_row < other.rows {
            let start = self.data + row * self.stride_bytes();
            let other_start = other.data + other_row * other.stride_bytes();
            let (end, other_end) = (start + self.row_bytes(), other_start + other.row_bytes());
            if start < other_end && other_start < end {
                return true;
            }
            if end <= other_start {
                // Rows that end before the other's next one starts are skipped in one step.
                row += ((other_start - end) / self.stride_bytes()).max(1);
            } else {
                other_row += ((start - other_end) / other.stride_bytes()).max(1);
            }
        }
        false
    }
}

impl std::fmt::Display for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}[{}, {}] on {}", self.dtype, self.rows, self.columns, self.device)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(tensor: &Tensor) -> std::collections::BTreeSet<usize> {
        let size = tensor.dtype.size();
        let row = |row| {
            let start = tensor.data + row * tensor.row_stride * size;
            start..start + tensor.columns * size
        };
        (0..tensor.rows).flat_map(row).collect()
    }

    fn tensors() -> impl Strategy<Value = Tensor> {
        let dtype = prop::sample::select(vec![DType::U8, DType::F16, DType::F32]);
        (1000_usize..1060, dtype, 0_usize..6, 0_usize..9, 0_usize..20).prop_map(
            |(data, dtype, rows, columns, gap)| Tensor {
                row_stride: columns + gap,
                ..Tensor::dense(data, Device::Cpu, dtype, rows, columns)
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]
        #[test]
        fn overlap_is_a_common_byte(left in tensors(), right in tensors()) {
            let common = bytes(&left).intersection(&bytes(&right)).next().is_some();
            prop_assert_eq!(left.overlaps(&right), common);
            prop_assert_eq!(right.overlaps(&left), common);
        }

        #[test]
        fn the_end_is_behind_the_last_byte(tensor in tensors()) {
            let last = bytes(&tensor).last().map_or(tensor.data, |last| last + 1);
            prop_assert_eq!(tensor.end(), Some(last));
        }
    }

    #[test]
    fn sizes_beyond_the_address_space_have_no_end() {
        let huge = [(usize::MAX, 2, 2), (2, usize::MAX, usize::MAX), (3, 1, usize::MAX / 2), (1, 1 << 63, 0)];
        for (rows, columns, row_stride) in huge {
            let tensor = Tensor { row_stride, ..Tensor::dense(4096, Device::Cpu, DType::F32, rows, columns) };
            assert_eq!(tensor.end(), None, "{tensor:?}");
        }
    }
}
