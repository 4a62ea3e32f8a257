//! What each rank of 8 has of published models, as text.

use tensorhaul_plan::parallel::{Fuse, ModelConfig, Partition, Ranks, Rules, Setup};
use tensorhaul_plan::quant::{Configs, Quantization, Survey, Values};
use tensorhaul_plan::{Checkpoint, Dequantize, DeviceId, Dtype, Layout};

use crate::models::{self, Model};

/// Prints shares one after the other.
fn text(model: &Model, fuse: Fuse, is_dequantized: bool, ranks: &[Ranks]) -> String {
    let checkpoint = model.checkpoint();
    let quantization = recognize(&checkpoint, model);
    let dequantize = all(&quantization);
    let config = ModelConfig::parse(model.config.as_bytes()).unwrap();
    let rules = Rules::of(&config).unwrap();
    let dequantize = is_dequantized.then_some(&dequantize);
    let setup = Setup { quantization: Some(&quantization), dequantize, fuse };
    let partition = Partition::new(&checkpoint, &config, &rules, &setup).unwrap();
    let share = |ranks: &Ranks| {
        let share = partition.share(ranks, DeviceId::Host).unwrap();
        partition.summary(&share).to_string()
    };
    ranks.iter().map(share).collect::<Vec<_>>().join("\n")
}

pub(crate) fn recognize(checkpoint: &Checkpoint, model: &Model) -> Quantization {
    let mut configs = Configs::none();
    configs.insert("config.json", model.config.as_bytes());
    let quantization = Survey::new(checkpoint, &configs).unwrap().recognize(checkpoint, &Values::none());
    assert_eq!(quantization.refused(), []);
    quantization
}

pub(crate) fn all(quantization: &Quantization) -> Dequantize {
    Dequantize {
        groups: quantization.shared_groups(),
        globs: None,
        dtype: Dtype::Bf16,
        layout: Layout::Rows,
        fold: false,
    }
}

fn golden(name: &str, text: &str) {
    insta::with_settings!({snapshot_path => "../golden", prepend_module_to_snapshot => false, omit_expression => true}, {
        insta::assert_snapshot!(name, text);
    });
}

fn first_and_last() -> [Ranks; 2] {
    [Ranks::alone().tp(0, 8), Ranks::alone().tp(7, 8)]
}

#[test]
fn llama_3_8b_in_8() {
    golden("llama_3_8b_tp8", &text(&models::llama_3_8b(), Fuse::No, false, &first_and_last()));
    golden("llama_3_8b_tp8_fused", &text(&models::llama_3_8b(), Fuse::All, false, &first_and_last()));
}

#[test]
fn mixtral_8x7b_in_8() {
    golden("mixtral_8x7b_tp8", &text(&models::mixtral_8x7b(), Fuse::No, false, &first_and_last()));
    let ranks = [Ranks::alone().tp(3, 8).ep(3, 8).whole_experts(), Ranks::alone().tp(1, 4).pp(1, 2)];
    golden("mixtral_8x7b_experts_and_stages_fused", &text(&models::mixtral_8x7b(), Fuse::All, false, &ranks));
}

#[test]
fn deepseek_v3_in_8() {
    golden("deepseek_v3_tp8", &text(&models::deepseek_v3(), Fuse::No, false, &first_and_last()));
    let ranks = [Ranks::alone().tp(7, 8).ep(7, 8).whole_experts()];
    golden("deepseek_v3_tp8_ep8_dequantized_fused", &text(&models::deepseek_v3(), Fuse::All, true, &ranks));
}

#[test]
fn gpt_oss_120b_in_8() {
    golden("gpt_oss_120b_tp8_dequantized", &text(&models::gpt_oss_120b(), Fuse::No, true, &first_and_last()));
    let ranks = [Ranks::alone().tp(7, 8).ep(7, 8).whole_experts()];
    // 90 blocks of 32 features: 12 each, and 6 for the last.
    golden("gpt_oss_120b_tp8", &text(&models::gpt_oss_120b(), Fuse::No, false, &first_and_last()));
    golden("gpt_oss_120b_tp8_ep8", &text(&models::gpt_oss_120b(), Fuse::No, false, &ranks));
}
