//! Whether a configuration and the headers of a checkpoint speak of the same model.

mod complete;

use super::{Dimensions, Layer, Mixer, Mlp, Quantization, RawTensor};
use crate::error::{Error, Result};
use crate::model::roles::geometry::{self, Side, Verdict};
use crate::model::roles::grids;
use crate::model::roles::names::{self, Leaf, Module, Name, Region, Scope, Size};

/// Compares the headers with the dimensions and settles what only the headers know: the rows of a padded vocabulary,
/// and whether there is an output head of its own.
///
/// A checkpoint may hold an output head although its configuration says (`says_tied`) that the head is the embedding.
/// One of the embedding's shape and type is taken for the copy that older tools wrote: it is dropped from `raw`,
/// because transformers keeps one of the two. Any other head counts, and the embedding is then not tied.
///
/// # Errors
/// [`Error::Contradiction`] with both values where the two cannot both be true, or where a tensor is missing.
pub(crate) fn against(
    raw: &mut Vec<RawTensor>,
    dimensions: &mut Dimensions,
    says_tied: bool,
    source_name: &str,
) -> Result<()> {
    let read: Vec<Name> = raw.iter().map(|tensor| names::read(&tensor.name)).collect();
    let checkpoint = Checkpoint { source_name, raw, read: &read, dimensions };
    checkpoint.hidden()?;
    checkpoint.layers()?;
    checkpoint.lengths()?;
    complete::layers(&checkpoint)?;
    let vocabulary = checkpoint.vocabulary()?;
    let head = checkpoint.ends(Module::Head).next().map(|(_, tensor)| tensor.clone());
    let embedding = checkpoint.ends(Module::Embedding).next().map(|(_, tensor)| tensor.clone());
    dimensions.vocabulary = vocabulary;
    if let Some(head) = head {
        let is_copy = embedding.is_some_and(|e| e.shape == head.shape && e.dtype == head.dtype);
        if says_tied && is_copy {
            raw.retain(|tensor| tensor.name != head.name);
        }
        dimensions.tied_embeddings = says_tied && is_copy;
    }
    Ok(())
}

/// Headers beside dimensions.
pub(crate) struct Checkpoint<'a> {
    source_name: &'a str,
    raw: &'a [RawTensor],
    read: &'a [Name],
    pub(crate) dimensions: &'a Dimensions,
}

impl<'a> Checkpoint<'a> {
    /// Tensors of the language model.
    pub(crate) fn text(&self) -> impl Iterator<Item = (&'a Name, &'a RawTensor)> + use<'a> {
        self.read.iter().zip(self.raw).filter(|(name, _)| name.region == Region::Text)
    }

    /// The main tensor of the embedding or the head.
    fn ends(&self, module: Module) -> impl Iterator<Item = (&'a Name, &'a RawTensor)> + use<'a> {
        self.text().filter(move |(name, tensor)| {
            name.module == module && name.leaf == Leaf::Weight && tensor.shape.len() == 2
        })
    }

    fn size(&self, name: &Name, tensor: &RawTensor) -> Option<Size> {
        grids::size(name, tensor, &self.dimensions.quantization)
    }

    fn contradiction(&self, left: String, right: String, remedy: &str) -> Error {
        let source_name = self.source_name.to_owned();
        Error::Contradiction { source_name, left, right, remedy: remedy.to_owned() }
    }

    pub(crate) fn missing(&self, tensor: &str, wanted_by: &str) -> Error {
        self.contradiction(
            wanted_by.to_owned(),
            format!("headers without {tensor}"),
            "the checkpoint is incomplete: download the missing file, or correct the configuration",
        )
    }

    fn hidden(&self) -> Result<()> {
        let hidden = self.dimensions.hidden;
        // OPT's smallest model projects its embedding into a wider residual stream.
        if self.text().any(|(name, _)| name.pattern.ends_with("project_in")) {
            return Ok(());
        }
        for (name, tensor) in self.text() {
            let width = match (name.module, tensor.shape.as_slice()) {
                (Module::Embedding, [_, width]) if name.leaf == Leaf::Weight => *width,
                (Module::FinalNorm, [width]) => *width,
                _ => continue,
            };
            if width != hidden {
                return Err(self.contradiction(
                    format!("hidden_size {hidden}"),
                    format!("{} of shape {:?}", tensor.name, tensor.shape),
                    "correct hidden_size, or take the configuration that belongs to these files",
                ));
            }
        }
        Ok(())
    }

    /// The rows that are split: those of the head, which may be padded beyond the vocabulary.
    fn vocabulary(&self) -> Result<u64> {
        let vocabulary = self.dimensions.vocabulary;
        let mut rows = None;
        for module in [Module::Embedding, Module::Head] {
            let Some((_, tensor)) = self.ends(module).next() else { continue };
            let found = tensor.shape.first().copied().unwrap_or(0);
            if found < vocabulary {
                return Err(self.contradiction(
                    format!("vocab_size {vocabulary}"),
                    format!("{} of shape {:?}", tensor.name, tensor.shape),
                    "correct vocab_size to the rows of the tensor, or take the configuration that belongs to \
                     these files",
                ));
            }
            rows = Some(found);
        }
        let named = |module| self.text().any(|(name, _)| name.module == module);
        let unnamed = self.text().filter(|(name, tensor)| {
            name.layer.is_none()
                && name.module == Module::Unknown
                && matches!(tensor.shape.as_slice(), [rows, width] if *rows >= vocabulary && *width == self.dimensions.hidden)
        });
        let mut unnamed = unnamed.count();
        let model = format!("a language model of vocab_size {vocabulary}");
        if !named(Module::Embedding) {
            if unnamed == 0 {
                return Err(self.missing("a token embedding (model.embed_tokens.weight or the like)", &model));
            }
            unnamed -= 1;
        }
        if !self.dimensions.tied_embeddings && !named(Module::Head) && unnamed == 0 {
            let wanted = "tie_word_embeddings false";
            return Err(self.missing("an output head (lm_head.weight or the like)", wanted));
        }
        Ok(rows.unwrap_or(vocabulary))
    }

    fn layers(&self) -> Result<()> {
        let count = self.dimensions.layers.len() as u64;
        let Some(highest) = self.text().filter_map(|(name, _)| name.layer).max() else {
            return if count == 0 {
                Ok(())
            } else {
                let wanted = format!("num_hidden_layers {count}");
                Err(self.missing("any layer (model.layers.0 or the like)", &wanted))
            };
        };
        let says = || format!("num_hidden_layers {count}");
        if highest.saturating_add(1) < count {
            return Err(self.contradiction(
                says(),
                format!("headers whose last layer is {highest}"),
                "the checkpoint is incomplete: download the missing files, or correct num_hidden_layers",
            ));
        }
        // Layers behind the last that predict further tokens say so by modules that no other layer has.
        let predicts = |layer: u64| {
            self.read.iter().any(|name| {
                name.layer == Some(layer)
                    && ["eh_proj", "enorm", "hnorm", "shared_head", "nextn"]
                        .iter()
                        .any(|mark| name.pattern.contains(mark))
            })
        };
        if let Some((name, tensor)) =
            self.text().find(|(name, _)| name.layer.is_some_and(|layer| layer >= count && !predicts(layer)))
        {
            let layer = name.layer.unwrap_or(count);
            return Err(self.contradiction(
                says(),
                format!("headers with a layer {layer} ({})", tensor.name),
                "correct num_hidden_layers, or take the configuration that belongs to these files",
            ));
        }
        Ok(())
    }

    fn layer(&self, name: &Name) -> Option<&'a Layer> {
        self.dimensions.layers.get(usize::try_from(name.layer?).ok()?)
    }

    /// The cut sides of projections against heads and widths.
    fn lengths(&self) -> Result<()> {
        for (name, tensor) in self.text() {
            let Some(layer) = self.layer(name) else { continue };
            if name.recurrent || self.is_hidden_in_bytes(tensor) {
                continue;
            }
            let Some(size) = self.size(name, tensor).or_else(|| stacked(name, tensor)) else { continue };
            let Verdict::Cut(rules) = geometry::verdict(name, size, self.dimensions) else { continue };
            let fits = rules.iter().any(|rule| {
                let (got, other) = match rule.side {
                    Side::Output => (size.outputs, size.inputs),
                    Side::Input => (size.inputs, size.outputs),
                };
                let turned = name.may_be_transposed && other.is_some() && other == rule.total();
                // EXL2 pads outputs to 32 columns.
                let padded = name.leaf == Leaf::ExlWeight
                    && got == rule.total().and_then(|n| n.checked_next_multiple_of(32));
                got.is_none() || got == rule.total() || turned || padded
            });
            if !fits {
                return Err(self.contradiction(
                    says(name.module, layer),
                    format!("{} of shape {:?}", tensor.name, tensor.shape),
                    "correct the configuration, or take the one that belongs to these files",
                ));
            }
        }
        Ok(())
    }

    /// Whether the shape is one of bytes, so that it says nothing of rows and columns.
    fn is_hidden_in_bytes(&self, tensor: &RawTensor) -> bool {
        matches!(self.dimensions.quantization, Quantization::Other { .. })
            && !matches!(tensor.dtype.as_str(), "BF16" | "F16" | "F32")
    }
}

/// Lengths of one of the matrices of a stack.
fn stacked(name: &Name, tensor: &RawTensor) -> Option<Size> {
    match (name.scope, name.leaf, tensor.shape.as_slice()) {
        (Scope::Stacked, Leaf::Weight, [_, outputs, inputs]) => {
            Some(Size { outputs: Some(*outputs), inputs: Some(*inputs) })
        }
        _ => None,
    }
}

/// What the configuration says about a module, in a configuration's words.
fn says(module: Module, layer: &Layer) -> String {
    match (module, &layer.mixer, &layer.mlp) {
        (Module::Gate | Module::Up | Module::GateUp | Module::Down, _, mlp) => match mlp {
            Mlp::Dense { width } => format!("intermediate_size {width}"),
            Mlp::Experts { count, width, shared_width, .. } => {
                format!("{count} experts of {width} columns and {shared_width} columns of shared experts")
            }
            Mlp::None => "no MLP".to_owned(),
        },
        (module, Mixer::Attention { query_heads, kv_heads, key_dim, value_dim, .. }, _) => {
            let product = |what: &str, heads: u64, dim: u64| {
                format!("{what} {heads} x head_dim {dim} = {}", heads.saturating_mul(dim))
            };
            match module {
                Module::Key => product("num_key_value_heads", *kv_heads, *key_dim),
                Module::Value => product("num_key_value_heads", *kv_heads, *value_dim),
                Module::Output => product("num_attention_heads", *query_heads, *value_dim),
                Module::Query => product("num_attention_heads", *query_heads, *key_dim),
                _ => format!(
                    "{} and {}",
                    product("num_attention_heads", *query_heads, *key_dim),
                    product("num_key_value_heads", *kv_heads, *key_dim)
                ),
            }
        }
        _ => "the heads of the configuration".to_owned(),
    }
}

#[cfg(test)]
mod tests;
