//! The feed-forward tensors of a layer, dense or with experts.

use crate::error::Result;
use crate::model::inventory::Builder;
use crate::model::inventory::traits::{Feed, Moe, Shared};

impl Builder<'_> {
    pub(in crate::model) fn dense(&mut self, base: &str, width: u64) -> Result<()> {
        let hidden = self.dimensions.hidden;
        let bias = self.bias(self.traits.mlp_bias)?;
        match self.traits.feed {
            Feed::Gated => self.gated(base, ["gate_proj", "up_proj", "down_proj"], width, bias),
            Feed::FusedGate => {
                let both = self.product(2, width)?;
                self.linear(&format!("{base}gate_up_proj"), both, hidden, bias)?;
                self.linear(&format!("{base}down_proj"), hidden, width, bias)
            }
            Feed::Plain(up, down) => {
                self.linear(&format!("{base}{up}"), width, hidden, bias)?;
                self.linear(&format!("{base}{down}"), hidden, width, bias)
            }
        }
    }

    fn gated(&mut self, base: &str, names: [&str; 3], width: u64, bias: bool) -> Result<()> {
        let hidden = self.dimensions.hidden;
        let [gate, up, down] = names;
        self.linear(&format!("{base}{gate}"), width, hidden, bias)?;
        self.linear(&format!("{base}{up}"), width, hidden, bias)?;
        self.linear(&format!("{base}{down}"), hidden, width, bias)
    }

    pub(in crate::model) fn experts(
        &mut self,
        base: &str,
        count: u64,
        width: u64,
        shared_width: u64,
    ) -> Result<()> {
        let hidden = self.dimensions.hidden;
        let both = self.product(2, width)?;
        match self.traits.moe {
            Moe::None => Err(self.config.contradiction(
                format!("{count} experts in {}", base.trim_end_matches('.')),
                format!("model_type \"{}\", which has none", self.config.architecture()),
                "correct the configuration, or give the checkpoint's folder, whose headers are enough",
            )),
            Moe::Modules { block, names, shared } => {
                let block = format!("{base}{block}.");
                self.plain(format!("{block}gate.weight"), &[count, hidden])?;
                if shared == (Shared::Plain { correction: true }) {
                    // Kept in float32: it decides which experts are chosen.
                    self.push(format!("{block}gate.e_score_correction_bias"), "F32", &[count])?;
                }
                for expert in 0..count {
                    self.gated(&format!("{block}experts.{expert}."), names, width, false)?;
                }
                let bias = self.bias(self.traits.mlp_bias)?;
                match shared {
                    Shared::Gated if shared_width > 0 => {
                        self.gated(&format!("{block}shared_expert."), names, shared_width, bias)?;
                        self.plain(format!("{block}shared_expert_gate.weight"), &[1, hidden])
                    }
                    Shared::Plain { .. } if shared_width > 0 => {
                        self.gated(&format!("{block}shared_experts."), names, shared_width, bias)
                    }
                    _ => Ok(()),
                }
            }
            Moe::Stacked { biases } => {
                let block = format!("{base}{}.", self.traits.mlp);
                self.plain(format!("{block}router.weight"), &[count, hidden])?;
                self.stacked(&format!("{block}experts.gate_up_proj"), [count, hidden, both])?;
                self.stacked(&format!("{block}experts.down_proj"), [count, width, hidden])?;
                if biases {
                    self.plain(format!("{block}router.bias"), &[count])?;
                    self.plain(format!("{block}experts.gate_up_proj_bias"), &[count, both])?;
                    self.plain(format!("{block}experts.down_proj_bias"), &[count, hidden])?;
                }
                if shared_width > 0 {
                    let names = ["gate_proj", "up_proj", "down_proj"];
                    self.gated(&format!("{block}shared_expert."), names, shared_width, false)?;
                }
                Ok(())
            }
            Moe::Granite => {
                let block = format!("{base}block_sparse_moe.");
                self.plain(format!("{block}input_linear.weight"), &[count, both, hidden])?;
                self.plain(format!("{block}output_linear.weight"), &[count, hidden, width])?;
                self.plain(format!("{block}router.layer.weight"), &[count, hidden])
            }
        }
    }
}
