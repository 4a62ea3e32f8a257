//! A rank's part of a model is what cutting the whole tensors gives, whoever reads it, as stored or dequantized; ranks together
//! have everything.

use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::Arc;

use tensorhaul::convert::{ConvertOptions, convert};
use tensorhaul::parallel::{Fuse, Parallel, Ranks, Rules, Unmatched};
use tensorhaul::{
    Dequantization, Dtype, EngineChoice, ErrorKind, ExternalMemory, Handover, LoadOptions, Loaded, Model,
    Preference, Request, Select,
};

const TINY_LLAMA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/models/tiny-llama");

/// A tensor as rows of bytes.
#[derive(Clone, Debug, PartialEq)]
struct Matrix {
    dtype: Dtype,
    shape: Vec<u64>,
    bytes: Vec<u8>,
}

impl Matrix {
    fn rows(&self, first: u64, end: u64) -> Matrix {
        let row_len = self.bytes.len() / self.shape[0] as usize;
        let mut shape = self.shape.clone();
        shape[0] = end - first;
        let bytes = self.bytes[first as usize * row_len..end as usize * row_len].to_vec();
        Matrix { dtype: self.dtype, shape, bytes }
    }

    fn cols(&self, first: u64, end: u64) -> Matrix {
        let [rows, cols] = self.shape[..] else { panic!("columns of {:?}", self.shape) };
        let width = self.bytes.len() / (rows * cols) as usize;
        let row = |row: u64| {
            let begin = (row * cols) as usize * width;
            self.bytes[begin + first as usize * width..begin + end as usize * width].to_vec()
        };
        let bytes = (0..rows).flat_map(row).collect();
        Matrix { dtype: self.dtype, shape: vec![rows, end - first], bytes }
    }

    fn beneath(&self, other: &Matrix) -> Matrix {
        let mut both = self.clone();
        both.shape[0] += other.shape[0];
        both.bytes.extend(&other.bytes);
        both
    }
}

fn matrices(loaded: &Loaded) -> BTreeMap<String, Matrix> {
    let matrix = |tensor: &tensorhaul::Tensor| Matrix {
        dtype: tensor.dtype(),
        shape: tensor.shape().to_vec(),
        bytes: tensor.bytes().unwrap().to_vec(),
    };
    loaded.tensors.iter().map(|(name, tensor)| (name.to_owned(), matrix(tensor))).collect()
}

/// A rank's part; what tiny-llama has besides a Llama's tensors, every rank has whole.
fn rank(ranks: Ranks) -> Parallel {
    Parallel::rank(ranks).unmatched(Unmatched::Replicate)
}

fn options(dequantize: bool) -> LoadOptions {
    let options = LoadOptions::default().handover(Handover::Private);
    if dequantize { options.dequantize(Dequantization::to(Dtype::Bf16)) } else { options }
}

/// Cuts whole tensors as a Llama of 8 heads and 4 KV heads of 8 features is cut, without asking any rule.
fn cut(whole: &BTreeMap<String, Matrix>, rank: u64, size: u64) -> BTreeMap<String, Matrix> {
    let share = |len: u64| (len / size * rank, len / size * (rank + 1));
    let cut = |(name, matrix): (&String, &Matrix)| {
        let has = |part: &str| name.contains(part);
        let is_scale = name.ends_with("weight_scale") || name.ends_with("weight_scale_inv");
        let rows = matrix.shape.first().copied().unwrap_or(1);
        let part = if has("norm") || is_scale || !has("proj") && !has("lm_head") && !has("embed_tokens") {
            matrix.clone()
        } else if has("k_proj") || has("v_proj") {
            let (ranks_of_a_head, heads) = (size.div_ceil(4), 4u64.div_ceil(size));
            let first = rank / ranks_of_a_head * heads;
            matrix.rows(first * 8, (first + heads) * 8)
        } else if has("o_proj") || has("down_proj") {
            let (first, end) = share(matrix.shape[1]);
            matrix.cols(first, end)
        } else if has("embed_tokens") || has("lm_head") {
            // 384 words are a multiple of 64, and of every size here.
            let each = 384 / size;
            matrix.rows((each * rank).min(384), (each * (rank + 1)).min(384))
        } else {
            let (first, end) = share(rows);
            matrix.rows(first, end)
        };
        (name.clone(), part)
    };
    whole.iter().map(cut).collect()
}

#[test]
fn a_ranks_tensors_are_the_cuts_of_the_whole_ones() {
    let model = Model::open(TINY_LLAMA).unwrap();
    for dequantize in [false, true] {
        let whole = matrices(&model.load(&options(dequantize)).unwrap());
        for size in [1, 2, 4, 8] {
            for tp_rank in 0..size {
                let expected = cut(&whole, tp_rank.into(), size.into());
                for engine in
                    [EngineChoice::Auto, EngineChoice::Pread, EngineChoice::IoUring, EngineChoice::Mmap]
                {
                    for in_place in [Preference::Preferred, Preference::Off] {
                        let options =
                            options(dequantize).engine(engine).in_place(in_place).staging_bytes(64 << 10);
                        let options = options.parallel(rank(Ranks::alone().tp(tp_rank, size)));
                        let loaded = model.load(&options).unwrap();
                        let found = matrices(&loaded);
                        assert_eq!(
                            found.keys().collect::<Vec<_>>(),
                            expected.keys().collect::<Vec<_>>(),
                            "rank {tp_rank} of {size}"
                        );
                        for (name, matrix) in &found {
                            assert!(
                                *matrix == expected[name],
                                "{name}, rank {tp_rank} of {size}, {options:?}"
                            );
                        }
                        let report = &loaded.report;
                        assert!(report.peak_staging_bytes <= report.promised.peak_staging_bytes);
                        assert!(report.peak_host_bytes <= report.promised.peak_host_bytes);
                        assert_eq!(report.promised.payload_bytes, report.bytes);
                    }
                }
            }
        }
    }
}

#[test]
fn fused_tensors_are_their_members_one_beneath_the_other() {
    let model = Model::open(TINY_LLAMA).unwrap();
    let whole = matrices(&model.load(&options(true)).unwrap());
    for tp_rank in 0..4 {
        let parts = cut(&whole, tp_rank.into(), 4);
        let parallel = rank(Ranks::alone().tp(tp_rank, 4)).fuse(Fuse::All);
        let found = matrices(&model.load(&options(true).parallel(parallel)).unwrap());
        for layer in 0..2 {
            let part = |name: &str| &parts[&format!("model.layers.{layer}.{name}.weight")];
            let fused = |name: &str| &found[&format!("model.layers.{layer}.{name}.weight")];
            let qkv =
                part("self_attn.q_proj").beneath(part("self_attn.k_proj")).beneath(part("self_attn.v_proj"));
            assert_eq!(*fused("self_attn.qkv_proj"), qkv);
            assert_eq!(*fused("mlp.gate_up_proj"), part("mlp.gate_proj").beneath(part("mlp.up_proj")));
            assert!(!found.contains_key(&format!("model.layers.{layer}.self_attn.q_proj.weight")));
        }
        // Fused tensors are chosen by their own names.
        let mut request = Request::of(Select::Globs(vec!["*.qkv_proj.*".to_owned()]));
        request.over_read_max = 4.0;
        let parallel = rank(Ranks::alone().tp(tp_rank, 4)).fuse(Fuse::Only(vec!["qkv".to_owned()]));
        let some = matrices(&model.load(&options(true).parallel(parallel).request(request)).unwrap());
        assert_eq!(some.len(), 2);
        assert!(some.iter().all(|(name, matrix)| found[name] == *matrix));
    }
}

#[test]
fn stages_have_their_layers_and_the_ends_of_the_model() {
    let model = Model::open(TINY_LLAMA).unwrap();
    let whole = matrices(&model.load(&options(false)).unwrap());
    let mut have = BTreeMap::new();
    for stage in 0..2 {
        let parallel = rank(Ranks::alone().pp(stage, 2));
        let found = matrices(&model.load(&options(false).parallel(parallel)).unwrap());
        assert_eq!(found.contains_key("model.embed_tokens.weight"), stage == 0);
        assert_eq!(found.contains_key("lm_head.weight"), stage == 1);
        have.extend(found);
    }
    assert!(have == whole);
}

#[test]
fn copies_of_ranks_load_back_as_what_the_ranks_load() {
    let model = Model::open(TINY_LLAMA).unwrap();
    let out = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for (tp_rank, dequantize, fuse) in
        [(0, None, Fuse::No), (1, Some(Dtype::F32), Fuse::All), (3, None, Fuse::No)]
    {
        let parallel = rank(Ranks::alone().tp(tp_rank, 4)).fuse(fuse);
        let mut load = LoadOptions::default().handover(Handover::Private).parallel(parallel.clone());
        let mut options = ConvertOptions::default().parallel(parallel);
        if let Some(dtype) = dequantize {
            load = load.dequantize(Dequantization::to(dtype).fold());
            options = options.dequantize(dtype);
        }
        let folder = out.path().join(tp_rank.to_string());
        let report = convert(&model, &folder, &options).unwrap();
        let copy = Model::open(&folder).unwrap();
        let found = matrices(&copy.load(&LoadOptions::default()).unwrap());
        assert!(found == matrices(&model.load(&load).unwrap()), "rank {tp_rank}");
        assert_eq!(report.tensors, found.len() as u64);
        let metadata = copy.checkpoint().files()[0].header().metadata();
        let ranks =
            metadata.iter().find(|(key, _)| *key == "tensorhaul.ranks").map(|(_, value)| value.to_owned());
        assert_eq!(ranks, Some(format!("tp {tp_rank}/4, pp 0/1, ep 0/1")));
    }
}

#[test]
fn plans_of_all_ranks_read_no_more_than_there_is() {
    let model = Model::open(TINY_LLAMA).unwrap();
    let options = options(false).parallel(rank(Ranks::alone()));
    let plans = model.plan_ranks(&options, Ranks::all(4, 1, 1)).unwrap();
    assert_eq!(plans.len(), 4);
    for plan in &plans {
        assert!(plan.promised.read_bytes >= plan.promised.payload_bytes);
    }
    let summary = model.describe_rank(&options, &Ranks::alone().tp(3, 4)).unwrap();
    assert!(summary.to_string().contains("row"), "{summary}");
    assert!(summary.kinds.iter().all(|kind| kind.padding_rows == 0), "{summary}");
}

#[test]
fn what_cannot_be_shared_is_refused_before_the_first_read() {
    let model = Model::open(TINY_LLAMA).unwrap();
    let error = |parallel: Parallel| model.load(&options(false).parallel(parallel)).unwrap_err();
    for (parallel, kind, words) in [
        (rank(Ranks::alone().tp(4, 4)), ErrorKind::BadRequest, "4 is outside its group of 4"),
        (rank(Ranks::alone().tp(0, 0)), ErrorKind::BadRequest, "a group of 0 has no ranks"),
        (rank(Ranks::alone().tp(0, 3)), ErrorKind::BadRequest, "3"),
        (rank(Ranks::alone().pp(0, 3)), ErrorKind::BadRequest, "2"),
        (rank(Ranks::alone()).fuse(Fuse::Only(vec!["kv".into()])), ErrorKind::BadRequest, "kv"),
    ] {
        let error = error(parallel);
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.one_line().contains(words), "{}", error.one_line());
    }
    let only_attention = Rules::parse(r#"{"layers.*.self_attn.q_proj": "colwise"}"#).unwrap();
    let parallel = rank(Ranks::alone().tp(0, 2)).rules(only_attention);
    let strict = parallel.clone().unmatched(Unmatched::Refuse);
    assert!(error(strict).one_line().contains("model.layers.0.self_attn.k_proj.weight"));
    assert!(model.load(&options(false).parallel(parallel)).is_ok(), "transformers replicates the rest");
    let mapped = LoadOptions::default().handover(Handover::Mapped).parallel(rank(Ranks::alone().tp(0, 2)));
    assert_eq!(model.load(&mapped).unwrap_err().kind(), ErrorKind::BadRequest);
}

/// Memory of a test's own, and the tensor that is to land in it.
fn given(len_bytes: usize) -> (Box<[u8]>, NonNull<u8>) {
    let mut memory = vec![0xeeu8; len_bytes].into_boxed_slice();
    let start = NonNull::new(memory.as_mut_ptr()).unwrap();
    (memory, start)
}

#[test]
fn a_ranks_tensors_land_in_views_of_the_callers_memory() {
    let model = Model::open(TINY_LLAMA).unwrap();
    let name = "model.layers.0.self_attn.o_proj.weight";
    let parallel = || rank(Ranks::alone().tp(1, 4));
    let expected = matrices(&model.load(&options(false).parallel(parallel())).unwrap())[name].clone();
    let [rows, cols] = expected.shape[..] else { panic!("{expected:?}") };
    // Columns 3.. of a matrix that is 5 columns wider.
    let pitch = cols + 5;
    let (memory, start) = given((rows * pitch * 2) as usize);
    for (in_place, engine) in [
        (Preference::Preferred, EngineChoice::Auto),
        (Preference::Off, EngineChoice::Pread),
        (Preference::Preferred, EngineChoice::IoUring),
    ] {
        // SAFETY: three elements further, in memory that outlives the load and its tensors.
        let view = unsafe { start.add(6) };
        let len_bytes = memory.len() as u64 - 6;
        // SAFETY: initialized memory of this test's own, which nobody touches until the tensor is there.
        let target = unsafe { ExternalMemory::host(view, len_bytes, Arc::new(())) };
        let target = target.layout(expected.dtype, [rows, cols], Some(vec![pitch, 1]));
        let options =
            options(false).in_place(in_place).engine(engine).parallel(parallel()).target(name, target);
        let loaded = model.load(&options).unwrap();
        let tensor = loaded.tensors.get(name).unwrap();
        assert_eq!(tensor.strides(), Some(&[pitch, 1][..]));
        assert_eq!(tensor.bytes().unwrap_err().kind(), ErrorKind::BadRequest);
        // SAFETY: the memory that was given; the load is over.
        let found = unsafe { std::slice::from_raw_parts(start.as_ptr(), memory.len()) };
        for (row, expected) in expected.bytes.chunks(cols as usize * 2).enumerate() {
            let begin = row * pitch as usize * 2;
            assert_eq!(&found[begin + 6..begin + 6 + expected.len()], expected);
            assert_eq!(&found[begin..begin + 6], [0xee; 6], "what lies between is left alone");
        }
    }
    for (dtype, shape, strides) in [
        (Dtype::F32, vec![rows, cols], None),
        (expected.dtype, vec![cols, rows], None),
        (expected.dtype, vec![rows, cols], Some(vec![cols - 1, 1])),
        (expected.dtype, vec![rows, cols], Some(vec![1])),
    ] {
        // SAFETY: as above; the load is refused.
        let target = unsafe { ExternalMemory::host(start, memory.len() as u64, Arc::new(())) };
        let target = target.layout(dtype, shape, strides);
        let error = model.load(&options(false).parallel(parallel()).target(name, target)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadRequest, "{error}");
        assert!(error.one_line().contains(name), "{}", error.one_line());
    }
}

#[test]
fn what_stays_unfused_is_among_the_reports_fallbacks() {
    let rules = r#"{"extends":"LlamaForCausalLM","rules":{},"fuse":[
        {"name":"odd","target":"layers.*.mlp.odd","rows":["layers.*.mlp.up_proj","layers.*.mlp.down_proj"]}]}"#;
    let model = Model::open(TINY_LLAMA).unwrap();
    let parallel = rank(Ranks::alone().tp(0, 2)).rules(Rules::parse(rules).unwrap());
    let load = |fuse| model.load(&options(false).parallel(parallel.clone().fuse(fuse)));
    let loaded = load(Fuse::All).unwrap();
    let told: Vec<&str> = loaded.report.fallbacks.iter().map(|fallback| fallback.what.as_str()).collect();
    assert!(
        told.contains(&"odd of 2 modules stays unfused, first \"model.layers.0.mlp.odd.weight\""),
        "{told:?}"
    );
    assert!(loaded.tensors.get("model.layers.1.mlp.down_proj.weight").is_some());
    assert!(load(Fuse::No).unwrap().report.fallbacks.iter().all(|fallback| !fallback.what.contains("odd")));
    let error = load(Fuse::Only(vec!["odd".to_owned()])).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadRequest);
    assert!(error.one_line().contains("stays quantized"), "{}", error.one_line());
}

#[test]
fn rows_of_padding_are_stated_and_left_to_whoever_gives_the_memory() {
    // 384 words in 4 shares of a multiple of 100: 100, 100, 100, and 84 with 16 of padding.
    let rules = r#"{"extends":"LlamaForCausalLM","rules":{
        "lm_head":{"rule":"vocab","pad_to":100},"embed_tokens":{"rule":"vocab","pad_to":100}}}"#;
    let model = Model::open(TINY_LLAMA).unwrap();
    let parallel = rank(Ranks::alone().tp(3, 4)).rules(Rules::parse(rules).unwrap());
    let options = || options(false).parallel(parallel.clone());
    let name = "lm_head.weight";
    let whole = matrices(&model.load(&self::options(false)).unwrap())[name].clone();
    let (padded, row) = (100 * 64 * 2, 64 * 2);
    let (memory, start) = given(padded);
    let target = |shape: [u64; 2]| {
        // SAFETY: initialized memory of this test's own, which nobody touches until the tensor is there.
        let target = unsafe { ExternalMemory::host(start, memory.len() as u64, Arc::new(())) };
        target.layout(whole.dtype, shape, None)
    };
    let error = model.load(&options().target(name, target([100, 64]))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadRequest);
    assert!(
        error.one_line().contains(
            "the memory given is for BF16 [100, 64], the tensor is BF16 [84, 64]; its 16 rows of padding are in no file and are not written"
        ),
        "{}",
        error.one_line()
    );
    model.load(&options().target(name, target([84, 64]))).unwrap();
    // SAFETY: the memory that was given; the load is over.
    let found = unsafe { std::slice::from_raw_parts(start.as_ptr(), memory.len()) };
    assert_eq!(found[..84 * row], whole.rows(300, 384).bytes);
    assert_eq!(found[84 * row..], vec![0xee; 16 * row]);
}

#[test]
fn dequantized_tensors_take_no_strides_and_that_is_told_before_the_first_read() {
    let model = Model::open(TINY_LLAMA).unwrap();
    let name = "model.layers.0.mlp.down_proj.weight";
    let (memory, start) = given(64 * 100 * 2);
    // SAFETY: as above.
    let target = unsafe { ExternalMemory::host(start, memory.len() as u64, Arc::new(())) };
    let target = target.layout(Dtype::Bf16, [64, 44], Some(vec![100, 1]));
    let options = options(true).parallel(rank(Ranks::alone().tp(1, 4))).target(name, target);
    let error = model.load(&options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadRequest);
    assert!(
        error
            .one_line()
            .contains("is dequantized, which needs memory without gaps; give it row-major strides"),
        "{}",
        error.one_line()
    );
    assert!(memory.iter().all(|byte| *byte == 0xee));
}
