//! On which streams the ranks' work goes.

use pyo3::intern;
use pyo3::prelude::*;

use super::dlpack;
use super::errors::invalid;
use crate::comm::{Device, Stream};

/// What `streams=` said.
#[derive(Debug)]
pub(super) enum Streams {
    /// What the tensor library calls the current one on the calling thread.
    Current,
    /// One a rank.
    Fixed(Vec<Stream>),
}

impl Streams {
    /// Reads `streams=`: `None`, or a handle or stream object a rank.
    pub(super) fn read(value: Option<&Bound<'_, PyAny>>, ranks: usize) -> PyResult<Self> {
        let Some(value) = value else { return Ok(Self::Current) };
        let py = value.py();
        let mut streams = Vec::new();
        for stream in value.try_iter()? {
            let stream = stream?;
            let handle = stream.getattr(intern!(py, "cuda_stream")).unwrap_or_else(|_| stream.clone());
            let number = handle.extract::<usize>().map_err(|_| {
                let index = streams.len();
                let wanted = "a torch.cuda.Stream, or a stream's handle as an int";
                invalid(py, format!("streams[{index}]"), stream.get_type(), wanted)
            })?;
            streams.push(Stream(number));
        }
        if streams.len() == ranks {
            return Ok(Self::Fixed(streams));
        }
        Err(invalid(py, "streams", format!("{} streams", streams.len()), format!("{ranks}, one a rank")))
    }

    /// The stream of one rank.
    pub(super) fn of(&self, py: Python<'_>, rank: usize, device: Device) -> PyResult<Stream> {
        match self {
            Self::Fixed(streams) => Ok(streams.get(rank).copied().unwrap_or_default()),
            Self::Current => match device {
                Device::Cpu => Ok(Stream::default()),
                Device::Cuda(index) => current(py, index),
            },
        }
    }

    /// The streams of all ranks; none on host memory, which has no queues.
    pub(super) fn of_all(&self, py: Python<'_>, devices: &[Device]) -> PyResult<Vec<Stream>> {
        if devices.iter().all(|device| *device == Device::Cpu) {
            return Ok(Vec::new());
        }
        let mut streams: Vec<Stream> = Vec::with_capacity(devices.len());
        for (rank, device) in devices.iter().enumerate() {
            // Ranks of one device share its current stream.
            let known = devices.iter().take(rank).position(|other| other == device);
            let known = known.filter(|_| matches!(self, Self::Current));
            let stream = known.and_then(|known| streams.get(known).copied());
            streams.push(stream.map_or_else(|| self.of(py, rank, *device), Ok)?);
        }
        Ok(streams)
    }
}

fn current(py: Python<'_>, index: u32) -> PyResult<Stream> {
    if let Some(stream) = dlpack::current_stream(py, index)? {
        return Ok(Stream(stream));
    }
    // No tensor was seen yet, or they are of a type that does not tell.
    let cuda = py.import(intern!(py, "torch.cuda"))?;
    let stream = cuda.call_method1(intern!(py, "current_stream"), (index,))?;
    Ok(Stream(stream.getattr(intern!(py, "cuda_stream"))?.extract()?))
}
