//! From the tensors of a checkpoint to their roles and to where each may be cut.

pub(in crate::model) mod geometry;
pub(in crate::model) mod gguf_names;
pub(in crate::model) mod grids;
pub(in crate::model) mod names;

use std::collections::{BTreeSet, HashMap};

use super::{CutAlong, Dimensions, Mixer, Part, RawTensor, Role, Tensor, Unsplittable};
use crate::model::roles::geometry::Verdict;
use crate::model::roles::grids::Holding;
use crate::model::roles::names::{Leaf, Name, Region, Scope, Size};

/// Gives every tensor its role and its parts, by its name and the geometry of its layer.
///
/// A rule is believed only if the tensor has the shape that the geometry asks for. Otherwise the tensor is held whole
/// by every rank, its [`Tensor::reason`] says what was found and what was wanted, and the second list names it, one
/// entry for all layers together. Order and bytes of the tensors are those of `raw`; the bytes of a tensor's parts
/// add up to the tensor's.
#[must_use]
pub fn classify(raw: Vec<RawTensor>, dimensions: &Dimensions) -> (Vec<Tensor>, Vec<Unsplittable>) {
    let read: Vec<Name> = raw.iter().map(|tensor| names::read(&tensor.name)).collect();
    let mut sizes: HashMap<&str, Size> = HashMap::new();
    for (name, tensor) in read.iter().zip(&raw) {
        if let Some(size) = grids::size(name, tensor, &dimensions.quantization) {
            sizes.insert(&name.prefix, size);
        }
    }
    let held: Vec<Held> = read
        .iter()
        .zip(&raw)
        .map(|(name, tensor)| {
            let size = sizes.get(name.prefix.as_str()).copied().unwrap_or_default();
            hold(name, size, tensor, dimensions)
        })
        .collect();

    // A bias or a scale follows its weight: where one tensor of a module is held whole, all are.
    let mut refused: HashMap<&str, (&Subject, &str)> = HashMap::new();
    for (name, held) in read.iter().zip(&held) {
        if let Held::Whole(subject, reason) = held {
            refused.entry(&name.prefix).or_insert((subject, reason));
        }
    }
    let mut list = List::default();
    let tensors = raw
        .into_iter()
        .zip(&read)
        .zip(&held)
        .map(|((tensor, name), held)| {
            let (holding, reason) = match (held, refused.get(name.prefix.as_str())) {
                (_, Some(&(subject, reason))) => {
                    list.add(subject, reason, name, tensor.bytes);
                    (Holding::whole(Role::Replicated, CutAlong::Whole, tensor.bytes), Some(reason.to_owned()))
                }
                (Held::As(holding), None) => (holding.clone(), None),
                (Held::Whole(_, reason), None) => {
                    (Holding::whole(Role::Replicated, CutAlong::Whole, tensor.bytes), Some(reason.clone()))
                }
            };
            let RawTensor { name, dtype, shape, bytes, .. } = tensor;
            Tensor { name, dtype, shape, bytes, role: holding.role, parts: holding.parts, reason }
        })
        .collect();
    (tensors, list.finish())
}

/// How a tensor is held.
enum Held {
    /// Cut, or whole as one would expect.
    As(Holding),
    /// Whole, with the reason, as a part of something that is named.
    Whole(Subject, String),
}

/// What the list of things that cannot be split calls the tensor.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Subject {
    /// A part of the model.
    Part(String),
    /// The module, one name for all layers.
    Module,
}

fn hold(name: &Name, size: Size, tensor: &RawTensor, dimensions: &Dimensions) -> Held {
    let part = |what: &str, reason: &str| Held::Whole(Subject::Part(what.to_owned()), reason.to_owned());
    let layers = dimensions.layers.len() as u64;
    match name.region {
        Region::Tower => {
            return part("vision or audio tower", "only the language model is split");
        }
        Region::Prediction => return part("multi-token prediction", PREDICTION),
        Region::CrossAttention => {
            return part("cross-attention", "it attends to another model's states, which are not split");
        }
        Region::Indexer => {
            return part("sparse attention's indexer", "its choice of tokens must be the same on every rank");
        }
        Region::Text if name.layer.is_some_and(|layer| layer >= layers) => {
            return part("multi-token prediction", PREDICTION);
        }
        Region::Text => {}
    }
    if name.recurrent {
        let mixer = match layer_mixer(name, dimensions) {
            Some(Mixer::Recurrent { name, .. }) => name.as_str(),
            _ => "recurrent mixer",
        };
        return Held::Whole(Subject::Part(mixer.to_owned()), geometry::recurrent_reason(mixer));
    }
    let whole = |role, along| Held::As(Holding::whole(role, along, tensor.bytes));
    match geometry::verdict(name, size, dimensions) {
        Verdict::Whole => whole(Role::Replicated, CutAlong::Whole),
        Verdict::WithAttention => whole(Role::AttentionIn, CutAlong::WholeWithAttention),
        Verdict::HeadNorm { one, all } => {
            let elements = tensor.shape.iter().try_fold(1_u64, |product, &n| product.checked_mul(n));
            if elements == Some(one) {
                whole(Role::AttentionIn, CutAlong::WholeWithAttention)
            } else if elements == Some(all.elements) {
                let parts = vec![Part { along: all.along, bytes: tensor.bytes, grid: 1 }];
                Held::As(Holding { role: Role::AttentionIn, parts })
            } else {
                let wanted = format!("wanted {one} elements of one head or {} of all heads", all.elements);
                Held::Whole(Subject::Module, format!("its shape is {:?}, {wanted}", tensor.shape))
            }
        }
        Verdict::Cut(rules) => {
            match grids::hold(&rules, name, tensor, dimensions.head_dim, &dimensions.quantization) {
                Ok(holding) => Held::As(holding),
                Err(reason) => Held::Whole(Subject::Module, reason),
            }
        }
        Verdict::Held(reason) => match layer_mixer(name, dimensions) {
            Some(Mixer::Recurrent { name: mixer, .. }) if name.scope == Scope::Layer => {
                Held::Whole(Subject::Part(mixer.clone()), geometry::recurrent_reason(mixer))
            }
            // A vector that no rule knows is a norm or a scale, and nobody expects it to be cut.
            _ if is_small(name, tensor) => whole(Role::Replicated, CutAlong::Whole),
            _ => Held::Whole(Subject::Module, reason),
        },
    }
}

const PREDICTION: &str = "its layers are behind the model's last and are not run";

fn layer_mixer<'a>(name: &Name, dimensions: &'a Dimensions) -> Option<&'a Mixer> {
    let layer = dimensions.layers.get(usize::try_from(name.layer?).ok()?)?;
    Some(&layer.mixer)
}

fn is_small(name: &Name, tensor: &RawTensor) -> bool {
    name.module == names::Module::Unknown
        && matches!(name.leaf, Leaf::Weight | Leaf::Bias | Leaf::Other)
        && tensor.shape.iter().filter(|&&n| n > 1).count() <= 1
}

/// Collects what cannot be split, one entry for everything that has the same name and reason.
#[derive(Default)]
struct List {
    at: HashMap<(String, String), usize>,
    entries: Vec<Entry>,
}

struct Entry {
    what: String,
    reason: String,
    layers: BTreeSet<u64>,
    tensors: u64,
    bytes: u64,
}

impl List {
    fn add(&mut self, subject: &Subject, reason: &str, name: &Name, bytes: u64) {
        let what = match subject {
            Subject::Part(part) => part,
            Subject::Module => &name.pattern,
        };
        let key = (what.clone(), reason.to_owned());
        let at = *self.at.entry(key).or_insert(self.entries.len());
        if at == self.entries.len() {
            self.entries.push(Entry {
                what: what.clone(),
                reason: reason.to_owned(),
                layers: BTreeSet::new(),
                tensors: 0,
                bytes: 0,
            });
        }
        if let Some(entry) = self.entries.get_mut(at) {
            entry.layers.extend(name.layer);
            entry.tensors += 1;
            entry.bytes = entry.bytes.saturating_add(bytes);
        }
    }

    fn finish(self) -> Vec<Unsplittable> {
        let plural = |n: u64, one: &str| if n == 1 { format!("1 {one}") } else { format!("{n} {one}s") };
        self.entries
            .into_iter()
            .map(|entry| {
                let tensors = plural(entry.tensors, "tensor");
                let count = match entry.layers.len() as u64 {
                    0 => tensors,
                    layers => format!("{}, {tensors}", plural(layers, "layer")),
                };
                Unsplittable {
                    what: format!("{} ({count})", entry.what),
                    reason: entry.reason,
                    bytes: entry.bytes,
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests;
