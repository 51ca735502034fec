//! [`plan`]: the crate's front door, where `model` and `split` meet.

use crate::error::Result;
use crate::model::{Costs, ModelShape};
use crate::split::{self, Options, Plan, RankBudget, Subject};

/// Plans a model over ranks: who holds which heads, columns and rows, and the bytes of every rank, item by item.
///
/// A plan that does not fit is returned as well, with [`Plan::fits`] false and [`Plan::shortfall`] saying what is
/// missing where; its splits are those that would fit if every rank had the least possible more.
///
/// # Errors
/// - [`crate::Error::InvalidArgument`] for budgets, speeds, token counts or shares that cannot be used, before
///   anything is computed;
/// - [`crate::Error::DoesNotFit`] for [`split::Context::Max`] where not even one token fits;
/// - [`crate::Error::NothingToApportion`] and [`crate::Error::ReferenceRefuses`] where
///   [`split::Strategy::ExLlamaV2`]'s arithmetic has no answer.
///
/// ```
/// use tp_rs::model::ModelShape;
/// use tp_rs::split::{Options, RankBudget};
///
/// let config = serde_json::json!({
///     "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
///     "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
///     "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
/// });
/// let shape = ModelShape::from_config(&config, "Llama-3-8B")?;
/// let budgets = [RankBudget::cuda(0, 14.0), RankBudget::cuda(1, 10.0)];
/// let plan = tp_rs::plan(&shape, &budgets, &Options::default())?;
/// assert!(plan.fits);
/// assert_eq!(plan.splits.q.total(), 32);
/// # Ok::<(), tp_rs::Error>(())
/// ```
pub fn plan(shape: &ModelShape, budgets: &[RankBudget], options: &Options) -> Result<Plan> {
    let taking_part = budgets.iter().filter(|budget| budget.gib > 0.0).count();
    let on_devices = budgets.iter().any(|budget| budget.device != "cpu");
    let costs = Costs::new(shape, options, taking_part, on_devices)?;
    let subject = Subject {
        model: shape.planned(),
        max_positions: shape.dimensions.max_positions,
        attention_footprints: shape.attention_footprints(),
        notes: shape.notes(),
        workload: &|context, chunk| costs.at(context, chunk),
    };
    let plan = split::plan(&subject, budgets, options)?;
    tracing::debug!(model = %plan.model.name, fits = plan.fits, max_context = plan.max_context, "planned");
    Ok(plan)
}
