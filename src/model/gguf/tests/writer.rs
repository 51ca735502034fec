//! Writes GGUF files for tests, right or wrong as asked.

/// A file in the making. Nothing is checked.
#[derive(Clone, Default)]
pub(crate) struct Writer {
    pub(crate) version: u32,
    pub(crate) alignment: usize,
    pub(crate) entries: Vec<Vec<u8>>,
    pub(crate) infos: Vec<Vec<u8>>,
    pub(crate) data_len: usize,
}

pub(crate) fn text(value: &str) -> Vec<u8> {
    [&(value.len() as u64).to_le_bytes(), value.as_bytes()].concat()
}

/// An array's value: the type of its elements, their number, their bytes.
pub(crate) fn array(element: u32, length: u64, bytes: &[u8]) -> Vec<u8> {
    [&element.to_le_bytes()[..], &length.to_le_bytes(), bytes].concat()
}

impl Writer {
    pub(crate) fn new() -> Self {
        Self { version: 3, alignment: 32, ..Self::default() }
    }

    pub(crate) fn entry(mut self, key: &str, value_type: u32, value: &[u8]) -> Self {
        self.entries.push([&text(key), &value_type.to_le_bytes()[..], value].concat());
        self
    }

    pub(crate) fn u32(self, key: &str, value: u32) -> Self {
        self.entry(key, 4, &value.to_le_bytes())
    }

    pub(crate) fn u16(self, key: &str, value: u16) -> Self {
        self.entry(key, 2, &value.to_le_bytes())
    }

    pub(crate) fn string(self, key: &str, value: &str) -> Self {
        self.entry(key, 8, &text(value))
    }

    /// A tensor at any offset, its dimensions innermost first.
    pub(crate) fn info(mut self, name: &str, dimensions: &[u64], id: u32, offset: u64) -> Self {
        let mut info = text(name);
        info.extend((dimensions.len() as u64).to_le_bytes()[..4].to_vec());
        for size in dimensions {
            info.extend(size.to_le_bytes());
        }
        info.extend(id.to_le_bytes());
        info.extend(offset.to_le_bytes());
        self.infos.push(info);
        self
    }

    /// A tensor of `bytes` bytes behind the ones before it.
    pub(crate) fn tensor(mut self, name: &str, dimensions: &[u64], id: u32, bytes: usize) -> Self {
        let offset = self.data_len.next_multiple_of(self.alignment);
        self.data_len = offset + bytes;
        self.info(name, dimensions, id, offset as u64)
    }

    /// The file up to its last tensor's end.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend((self.infos.len() as u64).to_le_bytes());
        bytes.extend((self.entries.len() as u64).to_le_bytes());
        bytes.extend(self.entries.concat());
        bytes.extend(self.infos.concat());
        let start = bytes.len().next_multiple_of(self.alignment);
        bytes.resize(if self.data_len == 0 { bytes.len() } else { start + self.data_len }, 0);
        bytes
    }
}
