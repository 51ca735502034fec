//! What the checkpoints of an architecture look like: names, fused projections, biases and norms, as data.

/// When a layer has a bias.
#[derive(Debug, Clone, Copy)]
pub(in crate::model) enum Bias {
    Never,
    Always,
    /// A key of the configuration says so; its value where it is not written.
    Key(&'static str, bool),
}

/// How queries, keys and values are projected.
#[derive(Debug, Clone, Copy)]
pub(in crate::model) enum Projection {
    /// `q_proj`, `k_proj`, `v_proj`.
    Separate,
    /// One tensor for all three, of this name.
    Fused(&'static str),
    /// Multi-head latent attention, from the ranks in the configuration.
    Latent,
}

/// Norms of queries and keys.
#[derive(Debug, Clone, Copy)]
pub(in crate::model) enum HeadNorm {
    None,
    /// One weight for every head: `q_norm`, `k_norm`.
    PerHead,
    /// A weight for every column of all heads.
    Wide,
    /// A weight of its own for each head, if the configuration has `use_qk_norm`.
    Cohere,
    /// A norm module for each head, if the configuration has `qk_layernorm`.
    StableLm,
    /// `q_layernorm` and `k_layernorm` with biases, if the configuration has `qk_layernorm`.
    Phi,
}

/// The MLP of a layer without experts.
#[derive(Debug, Clone, Copy)]
pub(in crate::model) enum Feed {
    /// `gate_proj`, `up_proj`, `down_proj`.
    Gated,
    /// `gate_up_proj`, `down_proj`.
    FusedGate,
    /// Up and down, of these names.
    Plain(&'static str, &'static str),
}

/// The MLP of a layer with experts.
#[derive(Debug, Clone, Copy)]
pub(in crate::model) enum Moe {
    None,
    /// A module an expert: name of the block, then gate, up and down.
    Modules {
        block: &'static str,
        names: [&'static str; 3],
        shared: Shared,
    },
    /// One tensor for all experts (`gate_up_proj`, `down_proj`), outputs innermost; biases of experts and router
    /// if true (gpt-oss), one shared expert if false (Llama 4).
    Stacked {
        biases: bool,
    },
    /// One tensor for all experts, inputs innermost (`GraniteMoE`).
    Granite,
}

/// Shared experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::model) enum Shared {
    None,
    /// `shared_expert` and `shared_expert_gate` (Qwen2-MoE).
    Gated,
    /// `shared_experts`, and DeepSeek-V3's `e_score_correction_bias` if true.
    Plain {
        correction: bool,
    },
}

/// The parameters of a norm.
#[derive(Debug, Clone, Copy)]
pub(in crate::model) enum Norm {
    /// None (`OLMo` 1).
    Bare,
    Weight,
    WithBias,
}

/// The norms of a layer.
#[derive(Debug, Clone, Copy)]
pub(in crate::model) enum Norms {
    /// These.
    Always(&'static [&'static str]),
    /// The first, and the second unless `use_parallel_residual` is true.
    Parallel(&'static str, &'static str),
    /// Falcon's: one or two, by layout.
    Falcon,
}

/// One family of checkpoints.
#[derive(Debug, Clone, Copy)]
pub(in crate::model) struct Traits {
    pub(in crate::model) model_types: &'static [&'static str],
    /// Before everything but the head.
    pub(in crate::model) base: &'static str,
    pub(in crate::model) layers: &'static str,
    pub(in crate::model) embedding: &'static str,
    pub(in crate::model) final_norm: &'static str,
    pub(in crate::model) head: &'static str,
    pub(in crate::model) head_bias: bool,
    pub(in crate::model) norm: Norm,
    pub(in crate::model) norms: Norms,
    pub(in crate::model) attention: &'static str,
    pub(in crate::model) projection: Projection,
    pub(in crate::model) output: &'static str,
    pub(in crate::model) qkv_bias: Bias,
    pub(in crate::model) output_bias: Bias,
    pub(in crate::model) head_norm: HeadNorm,
    /// A logit a head that takes part in the softmax (gpt-oss).
    pub(in crate::model) sinks: bool,
    pub(in crate::model) mlp: &'static str,
    pub(in crate::model) feed: Feed,
    pub(in crate::model) mlp_bias: Bias,
    pub(in crate::model) moe: Moe,
}

const ATTENTION_BIAS: Bias = Bias::Key("attention_bias", false);
const TWO: Norms = Norms::Always(&["input_layernorm", "post_attention_layernorm"]);
const FOUR: Norms = Norms::Always(&[
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
]);
const ONE: Norms = Norms::Always(&["input_layernorm"]);
const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// Llama's layout, from which the others are told by what differs.
const LLAMA: Traits = Traits {
    model_types: &["llama", "granite", "smollm3"],
    base: "model.",
    layers: "layers",
    embedding: "embed_tokens",
    final_norm: "norm",
    head: "lm_head",
    head_bias: false,
    norm: Norm::Weight,
    norms: TWO,
    attention: "self_attn",
    projection: Projection::Separate,
    output: "o_proj",
    qkv_bias: ATTENTION_BIAS,
    output_bias: ATTENTION_BIAS,
    head_norm: HeadNorm::None,
    sinks: false,
    mlp: "mlp",
    feed: Feed::Gated,
    mlp_bias: Bias::Key("mlp_bias", false),
    moe: Moe::None,
};

/// Every architecture whose checkpoints are known, after the modelling files of transformers 5.17.
pub(in crate::model) static TRAITS: &[Traits] = &[
    LLAMA,
    Traits {
        model_types: &["mistral"],
        qkv_bias: Bias::Never,
        output_bias: Bias::Never,
        mlp_bias: Bias::Never,
        ..LLAMA
    },
    Traits {
        model_types: &["mixtral"],
        qkv_bias: Bias::Never,
        output_bias: Bias::Never,
        moe: Moe::Modules { block: "block_sparse_moe", names: ["w1", "w3", "w2"], shared: Shared::None },
        ..LLAMA
    },
    Traits {
        model_types: &["qwen2"],
        qkv_bias: Bias::Always,
        output_bias: Bias::Never,
        mlp_bias: Bias::Never,
        ..LLAMA
    },
    Traits {
        model_types: &["qwen2_moe"],
        qkv_bias: Bias::Key("qkv_bias", true),
        output_bias: Bias::Never,
        mlp_bias: Bias::Never,
        moe: Moe::Modules { block: "mlp", names: PROJECTIONS, shared: Shared::Gated },
        ..LLAMA
    },
    Traits {
        model_types: &["qwen3", "qwen3_moe"],
        head_norm: HeadNorm::PerHead,
        mlp_bias: Bias::Never,
        moe: Moe::Modules { block: "mlp", names: PROJECTIONS, shared: Shared::None },
        ..LLAMA
    },
    Traits { model_types: &["gemma"], mlp_bias: Bias::Never, ..LLAMA },
    Traits { model_types: &["gemma2"], norms: FOUR, mlp_bias: Bias::Never, ..LLAMA },
    Traits {
        model_types: &["gemma3_text"],
        norms: FOUR,
        head_norm: HeadNorm::PerHead,
        mlp_bias: Bias::Never,
        ..LLAMA
    },
    Traits {
        model_types: &["phi3"],
        projection: Projection::Fused("qkv_proj"),
        qkv_bias: Bias::Never,
        output_bias: Bias::Never,
        feed: Feed::FusedGate,
        mlp_bias: Bias::Never,
        ..LLAMA
    },
    Traits {
        model_types: &["phi"],
        final_norm: "final_layernorm",
        head_bias: true,
        norm: Norm::WithBias,
        norms: ONE,
        output: "dense",
        qkv_bias: Bias::Always,
        output_bias: Bias::Always,
        head_norm: HeadNorm::Phi,
        feed: Feed::Plain("fc1", "fc2"),
        mlp_bias: Bias::Always,
        ..LLAMA
    },
    Traits {
        model_types: &["deepseek_v2"],
        projection: Projection::Latent,
        moe: Moe::Modules { block: "mlp", names: PROJECTIONS, shared: Shared::Plain { correction: false } },
        ..LLAMA
    },
    Traits {
        model_types: &["deepseek_v3"],
        projection: Projection::Latent,
        mlp_bias: Bias::Never,
        moe: Moe::Modules { block: "mlp", names: PROJECTIONS, shared: Shared::Plain { correction: true } },
        ..LLAMA
    },
    Traits { model_types: &["olmo"], norm: Norm::Bare, mlp_bias: Bias::Never, ..LLAMA },
    Traits {
        model_types: &["olmo2", "olmo3"],
        norms: Norms::Always(&["post_attention_layernorm", "post_feedforward_layernorm"]),
        head_norm: HeadNorm::Wide,
        mlp_bias: Bias::Never,
        ..LLAMA
    },
    Traits {
        model_types: &["olmoe"],
        head_norm: HeadNorm::Wide,
        mlp_bias: Bias::Never,
        moe: Moe::Modules { block: "mlp", names: PROJECTIONS, shared: Shared::None },
        ..LLAMA
    },
    Traits { model_types: &["granitemoe"], moe: Moe::Granite, ..LLAMA },
    Traits {
        model_types: &["cohere"],
        norms: ONE,
        head_norm: HeadNorm::Cohere,
        mlp_bias: Bias::Never,
        ..LLAMA
    },
    Traits { model_types: &["cohere2"], norms: ONE, mlp_bias: Bias::Never, ..LLAMA },
    Traits {
        model_types: &["starcoder2"],
        norm: Norm::WithBias,
        qkv_bias: Bias::Key("use_bias", true),
        output_bias: Bias::Key("use_bias", true),
        feed: Feed::Plain("c_fc", "c_proj"),
        mlp_bias: Bias::Key("use_bias", true),
        ..LLAMA
    },
    Traits {
        model_types: &["glm"],
        qkv_bias: Bias::Key("attention_bias", true),
        output_bias: Bias::Never,
        feed: Feed::FusedGate,
        mlp_bias: Bias::Never,
        ..LLAMA
    },
    Traits {
        model_types: &["glm4"],
        norms: Norms::Always(&[
            "input_layernorm",
            "post_attention_layernorm",
            "post_mlp_layernorm",
            "post_self_attn_layernorm",
        ]),
        qkv_bias: Bias::Key("attention_bias", true),
        output_bias: Bias::Never,
        feed: Feed::FusedGate,
        mlp_bias: Bias::Never,
        ..LLAMA
    },
    Traits {
        model_types: &["gpt_neox"],
        base: "gpt_neox.",
        embedding: "embed_in",
        final_norm: "final_layer_norm",
        head: "embed_out",
        norm: Norm::WithBias,
        attention: "attention",
        projection: Projection::Fused("query_key_value"),
        output: "dense",
        qkv_bias: Bias::Key("attention_bias", true),
        output_bias: Bias::Key("attention_bias", true),
        feed: Feed::Plain("dense_h_to_4h", "dense_4h_to_h"),
        mlp_bias: Bias::Always,
        ..LLAMA
    },
    Traits {
        model_types: &["gpt_oss"],
        qkv_bias: Bias::Key("attention_bias", true),
        output_bias: Bias::Key("attention_bias", true),
        sinks: true,
        moe: Moe::Stacked { biases: true },
        ..LLAMA
    },
    Traits {
        model_types: &["llama4_text"],
        mlp: "feed_forward",
        mlp_bias: Bias::Never,
        moe: Moe::Stacked { biases: false },
        ..LLAMA
    },
    Traits {
        model_types: &["stablelm"],
        norm: Norm::WithBias,
        norms: Norms::Parallel("input_layernorm", "post_attention_layernorm"),
        qkv_bias: Bias::Key("use_qkv_bias", false),
        output_bias: Bias::Never,
        head_norm: HeadNorm::StableLm,
        mlp_bias: Bias::Never,
        ..LLAMA
    },
    Traits {
        model_types: &["falcon"],
        base: "transformer.",
        layers: "h",
        embedding: "word_embeddings",
        final_norm: "ln_f",
        norm: Norm::WithBias,
        norms: Norms::Falcon,
        attention: "self_attention",
        projection: Projection::Fused("query_key_value"),
        output: "dense",
        qkv_bias: Bias::Key("bias", false),
        output_bias: Bias::Key("bias", false),
        feed: Feed::Plain("dense_h_to_4h", "dense_4h_to_h"),
        mlp_bias: Bias::Key("bias", false),
        ..LLAMA
    },
];

/// Wrappers with other modalities, and what their checkpoints write before the language model's names.
pub(in crate::model) const WRAPPERS: &[(&str, &str)] =
    &[("gemma3", "language_model."), ("llama4", "language_model."), ("mistral3", "language_model.")];
