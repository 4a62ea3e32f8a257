//! A rank's packed part is a checkpoint of its own: it becomes the rank's part of the numbers, bit for bit.

use serde_json::json;
use tensorhaul::convert::{ConvertOptions, convert};
use tensorhaul::parallel::{Fuse, Parallel, Ranks, Rules, Unmatched};
use tensorhaul::{Dequantization, Dtype, ErrorKind, LoadOptions, Model};

use crate::case::{Case, Expected};
use crate::check::dequantized;
use crate::common::Folder;
use crate::compressed::Packed;
use crate::gptq::{Gptq, Order, Zeros};
use crate::pack::nibbles_low_first;

const ROW: &str = "model.layers.0.mlp.down_proj";
const COLUMN: &str = "model.layers.0.mlp.up_proj";
const SIZES: [usize; 2] = [64, 256];
const GROUP_SIZE: usize = 32;

/// Two layers in GPTQ; what the configuration says of an act-order need not be so.
fn case(gptq: Gptq, desc_act: bool) -> Case {
    let version = if gptq.zeros == Zeros::V2 { "gptq_v2" } else { "gptq" };
    let config = json!({
        "quant_method": "gptq", "bits": gptq.bits, "group_size": GROUP_SIZE, "desc_act": desc_act,
        "sym": gptq.zeros == Zeros::SymmetricV1, "checkpoint_format": version,
    });
    let mut case = Case::new(format!("ranks of {gptq:?}"), config);
    gptq.layer(&mut case, ROW, SIZES);
    gptq.layer(&mut case, COLUMN, SIZES);
    case
}

fn gptq(zeros: Zeros, order: Order) -> Gptq {
    Gptq { zeros, order, group_size: Some(GROUP_SIZE), ..Gptq::default() }
}

fn parallel(rank: u32, size: u32) -> Parallel {
    let rules = r#"{"rules":{"model.layers.*.mlp.down_proj":"row","model.layers.*.mlp.up_proj":"column"}}"#;
    Parallel::rank(Ranks::alone().tp(rank, size)).rules(Rules::parse(rules).unwrap())
}

/// Writes a rank's part, packed as it is.
fn copy(case: &Case, rank: u32, size: u32) -> Folder {
    copy_of(case, parallel(rank, size))
}

fn copy_of(case: &Case, parallel: Parallel) -> Folder {
    let (whole, out) = (Folder::on_disk(), Folder::on_disk());
    case.write(whole.path());
    let options = ConvertOptions::default().parallel(parallel);
    convert(&Model::open(whole.path()).unwrap(), &out.path().join("rank"), &options).unwrap();
    out
}

/// A rank's share of the rows, or of the columns.
fn part(expected: &Expected, rank: usize, size: usize) -> Vec<u32> {
    let [rows, cols] = SIZES;
    let is_in = |place: usize, len: usize| (len / size * rank..len / size * (rank + 1)).contains(&place);
    let is_kept = |at: &usize| match expected.name.starts_with(ROW) {
        true => is_in(at % cols, cols),
        false => is_in(at / cols, rows),
    };
    let kept = (0..rows * cols).filter(is_kept);
    kept.map(|at| expected.values[at].to_bits()).collect()
}

#[test]
fn an_index_in_order_does_not_make_a_rank_carry_the_scales_of_others() {
    for (order, desc_act) in
        [(Order::Unsaid, false), (Order::Trivial, false), (Order::Trivial, true), (Order::AllZero, false)]
    {
        for zeros in [Zeros::SymmetricV1, Zeros::V1, Zeros::V2] {
            let case = case(gptq(zeros, order), desc_act);
            for (rank, size) in [(0, 2), (1, 2), (3, 4), (7, 8)] {
                let context = format!("{}, rank {rank} of {size}", case.name);
                let folder = copy(&case, rank, size);
                let path = folder.path().join("rank");
                let shape = |name: &str| Model::open(&path).unwrap().tensor(name).unwrap().shape().to_vec();
                let groups = (SIZES[1] / GROUP_SIZE) as u64 / u64::from(size);
                assert_eq!(shape(&format!("{ROW}.scales")), [groups, 64], "{context}");
                assert_eq!(shape(&format!("{ROW}.qzeros")), [groups, 8], "{context}");
                let tensors = dequantized(&path, Dequantization::to(Dtype::F32));
                let tensors = tensors.unwrap_or_else(|error| panic!("{context}: {}", error.one_line()));
                for expected in &case.expected {
                    let found = tensors.get(&expected.name).unwrap().to_vec::<f32>().unwrap();
                    let found: Vec<u32> = found.into_iter().map(f32::to_bits).collect();
                    let expected = part(expected, rank as usize, size as usize);
                    // The sign of zero is nobody's business.
                    let is_same = |(one, other): (&u32, &u32)| one == other || (one | other) << 1 == 0;
                    assert_eq!(found.len(), expected.len(), "{context}");
                    assert!(found.iter().zip(&expected).all(is_same), "{context}");
                }
            }
        }
    }
}

#[test]
fn an_index_of_an_act_order_keeps_the_scales_of_all_groups() {
    // The configuration says that there is no act-order; the index decides.
    let case = case(gptq(Zeros::V2, Order::ByActivation), false);
    let folder = copy(&case, 1, 2);
    let model = Model::open(folder.path().join("rank")).unwrap();
    assert_eq!(model.tensor(&format!("{ROW}.scales")).unwrap().shape(), [8, 64]);
    let indices = model.tensor(&format!("{ROW}.g_idx")).unwrap().to_vec::<i32>().unwrap();
    let stored = case.tensors.iter().find(|stored| stored.name == format!("{ROW}.g_idx")).unwrap();
    let whole: Vec<i32> = stored.bytes.as_chunks().0.iter().map(|bytes| i32::from_le_bytes(*bytes)).collect();
    assert_eq!(indices, whole[128..]);
}

#[test]
fn a_part_that_says_what_holds_for_the_whole_is_refused_as_a_part() {
    let act_order = copy(&case(gptq(Zeros::V2, Order::ByActivation), true), 1, 2);
    // `weight_shape` stays that of the whole.
    let rules = Rules::parse(r#"{"rules":{"model.layers.0.self_attn.q_proj":"row"}}"#).unwrap();
    let rank = Parallel::rank(Ranks::alone().tp(1, 2)).rules(rules).unmatched(Unmatched::Replicate);
    let shaped = copy_of(&Packed::default().case(), rank);
    for folder in [act_order, shaped] {
        let error = dequantized(&folder.path().join("rank"), Dequantization::to(Dtype::F32)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadRequest);
        let text = error.one_line();
        assert!(text.contains("is one rank's packed part (tp 1/2, pp 0/1, ep 0/1)"), "{text}");
        assert!(text.contains("convert --dequantize with the same ranks"), "{text}");
    }
}

#[test]
fn a_copy_for_a_rank_alone_is_no_part() {
    let whole = copy(&case(gptq(Zeros::V2, Order::Trivial), false), 0, 1);
    let model = Model::open(whole.path().join("rank")).unwrap();
    let mut files = model.checkpoint().files().iter();
    assert!(files.all(|file| file.header().metadata().get("tensorhaul.ranks").is_none()));
}

#[test]
fn a_ranks_numbers_come_out_by_columns_on_request() {
    let case = case(gptq(Zeros::SymmetricV1, Order::Unsaid), false);
    let folder = Folder::on_disk();
    case.write(folder.path());
    let model = Model::open(folder.path()).unwrap();
    for (rank, size) in [(0, 1), (1, 2), (3, 4)] {
        let dequantization = Dequantization::to(Dtype::F32).as_stored();
        let options = LoadOptions::default().dequantize(dequantization).parallel(parallel(rank, size));
        let tensors = model.load(&options).unwrap().tensors;
        for expected in &case.expected {
            let tensor = tensors.get(&expected.name).unwrap();
            let due = part(expected, rank as usize, size as usize);
            let is_row = expected.name.starts_with(ROW);
            let [rows, cols] = match is_row {
                true => [SIZES[0], SIZES[1] / size as usize],
                false => [SIZES[0] / size as usize, SIZES[1]],
            };
            assert_eq!(tensor.shape(), [cols as u64, rows as u64], "{}", expected.name);
            let found = tensor.to_vec::<f32>().unwrap();
            let is_same = |at: usize| found[at % cols * rows + at / cols] == f32::from_bits(due[at]);
            assert!((0..rows * cols).all(is_same), "{}, rank {rank} of {size}", expected.name);
        }
    }
}

#[test]
fn rows_of_several_lie_beneath_one_another_whatever_the_layout() {
    let mut case = case(gptq(Zeros::SymmetricV1, Order::Unsaid), false);
    gptq(Zeros::SymmetricV1, Order::Unsaid).layer(&mut case, "model.layers.0.mlp.gate_proj", SIZES);
    let folder = Folder::on_disk();
    case.write(folder.path());
    let rules = r#"{
        "rules": {"model.layers.*.mlp.down_proj": "row", "model.layers.*.mlp.up_proj": "column", "model.layers.*.mlp.gate_proj": "column"},
        "fuse": [{"name": "both", "target": "model.layers.*.mlp.both",
                  "rows": ["model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj"]}]
    }"#;
    let rank = Parallel::rank(Ranks::alone().tp(1, 2)).rules(Rules::parse(rules).unwrap()).fuse(Fuse::All);
    let load = |dequantization| {
        let options = LoadOptions::default().dequantize(dequantization).parallel(rank.clone());
        Model::open(folder.path()).unwrap().load(&options).unwrap().tensors
    };
    let by_rows = load(Dequantization::to(Dtype::F32));
    let as_stored = load(Dequantization::to(Dtype::F32).as_stored());
    let both = "model.layers.0.mlp.both.weight";
    assert_eq!(as_stored.get(both).unwrap().shape(), [64, 256]);
    assert!(as_stored.get(both).unwrap().bytes().unwrap() == by_rows.get(both).unwrap().bytes().unwrap());
    assert_eq!(as_stored.get(&format!("{ROW}.weight")).unwrap().shape(), [128, 64]);
}

/// One layer of gpt-oss, packed.
fn gpt_oss([hidden, inner, experts]: [usize; 3]) -> Case {
    let config = json!({
        "architectures": ["GptOssForCausalLM"], "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "hidden_size": hidden, "intermediate_size": inner, "num_local_experts": experts,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp.router"]},
    });
    let mut case = Case::bare("gpt-oss").config("config.json", config);
    for (name, rows, cols) in [("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)] {
        let name = format!("model.layers.0.mlp.experts.{name}");
        let codes = case.codes(experts * rows * cols, 4);
        let scales = case.power_scales(Dtype::U8, &[experts, rows, cols / 32]);
        let blocks = nibbles_low_first(&codes);
        case.store(format!("{name}_blocks"), Dtype::U8, &[experts, rows, cols / 32, 16], blocks);
        case.store_floats(format!("{name}_scales"), &scales);
    }
    case.keep("model.layers.0.mlp.router.weight", Dtype::Bf16, &[experts, hidden]);
    case
}

#[test]
fn a_plain_copy_of_gpt_oss_has_its_experts_as_plain_checkpoints_do_and_is_cut_as_such() {
    let (whole, out) = (Folder::on_disk(), Folder::on_disk());
    gpt_oss([96, 64, 3]).write(whole.path());
    let model = Model::open(whole.path()).unwrap();
    let copy = out.path().join("plain");
    convert(&model, &copy, &ConvertOptions::default().dequantize(Dtype::F32)).unwrap();
    let copy = Model::open(&copy).unwrap();
    for (rank, size) in [(0, 1), (0, 2), (1, 2)] {
        let parallel = Parallel::rank(Ranks::alone().tp(rank, size));
        let options = LoadOptions::default().parallel(parallel);
        let numbers = options.clone().dequantize(Dequantization::to(Dtype::F32));
        let (of_packed, of_copy) =
            (model.load(&numbers).unwrap().tensors, copy.load(&options).unwrap().tensors);
        for name in ["gate_up_proj", "down_proj"] {
            let name = format!("model.layers.0.mlp.experts.{name}");
            let (packed, plain) = (of_packed.get(&name).unwrap(), of_copy.get(&name).unwrap());
            let [experts, rows, cols] = *packed.shape() else { panic!("{:?}", packed.shape()) };
            assert_eq!(plain.shape(), [experts, cols, rows], "{name}, rank {rank} of {size}");
            let (packed, plain) = (packed.to_vec::<f32>().unwrap(), plain.to_vec::<f32>().unwrap());
            let (rows, cols) = (rows as usize, cols as usize);
            let transposed =
                |at: usize| at / (rows * cols) * rows * cols + at % cols * rows + at / cols % rows;
            assert!(
                (0..packed.len()).all(|at| packed[at].to_bits() == plain[transposed(at)].to_bits()),
                "{name}, rank {rank} of {size}"
            );
        }
    }
}

#[test]
fn what_is_to_be_dequantized_is_there_also_for_ranks() {
    let case = case(gptq(Zeros::SymmetricV1, Order::Unsaid), false);
    let folder = Folder::on_disk();
    case.write(folder.path());
    let load = |glob: &str| {
        let dequantization = Dequantization::to(Dtype::F32).only([glob]);
        let options = LoadOptions::default().dequantize(dequantization).parallel(parallel(0, 2));
        Model::open(folder.path()).unwrap().load(&options)
    };
    assert_eq!(
        load("*.down_proj.*").unwrap().tensors.get(&format!("{ROW}.weight")).unwrap().shape(),
        [64, 128]
    );
    let error = load("*nothing*").map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadRequest);
    assert!(error.one_line().contains(r#"no tensor matches "*nothing*""#), "{}", error.one_line());
}
