//! Parsing and planning headers of 100,000 and 1,000,000 tensors, beside the reference crate's parser.
//!
//! The names are those of a mixture-of-experts checkpoint, about 100 bytes of JSON per tensor. `shuffled` lists
//! the same tensors out of the order of their data, as writers that sort by name do. The reference parses the same
//! bytes to the same checks (`Metadata`), without the data behind them, and plans nothing.
//!
//! Asked: 60 ms for 100,000 tensors and 0.8 s for 1,000,000, parsed and planned on one core, and memory that grows no
//! faster than the number of tensors. Memory is counted by the allocator and printed first.
//!
//! `recognize` joins the 50,000 tensors of quantized experts to groups, in the formats with the fewest and the most tensors to a
//! weight; `dequantize` plans their numbers, `stored` what a load without that plans. Asked: 100 ms for recognition and what planning
//! takes longer. `plain` is what looking for quantization costs where there is none.
//!
//! `cut_rows` and `cut_cols` cut every group for the second of eight ranks, `stored_cols` the packed tensors. Asked: 30 ms for the 45,000
//! groups of DeepSeek-V3, whose format is `fp8_blocks`.

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use criterion::measurement::WallTime;
use criterion::{BatchSize, BenchmarkGroup, BenchmarkId, Criterion, Throughput};
use safetensors::tensor::Metadata;
use tensorhaul_plan::header::{Header, NewTensor, encode};

use tensorhaul_plan::quant::{Configs, Group, Survey, Values, Window};
use tensorhaul_plan::{Checkpoint, Dequantize, Dtype, File, InPlace, Machine, Plan, Request};

const TENSOR_COUNTS: [usize; 2] = [100_000, 1_000_000];

fn main() {
    memory();
    let mut criterion = Criterion::default().configure_from_args();
    time(&mut criterion);
    recognize(&mut criterion);
    criterion.final_summary();
}

fn time(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("header");
    group.sample_size(10);
    for tensor_count in TENSOR_COUNTS {
        for (order, step) in [("in_order", 1), ("shuffled", 7_919)] {
            let (json, file_len_bytes) = moe_header(tensor_count, step);
            group.throughput(Throughput::Bytes(json.len() as u64));
            let mut bench = |what: &str, run: &dyn Fn(&[u8]) -> usize| {
                assert_eq!(run(&json), tensor_count, "{what}");
                group.bench_function(BenchmarkId::new(format!("{what}/{order}"), tensor_count), |bencher| {
                    bencher.iter_batched(|| (), |()| run(black_box(&json)), BatchSize::PerIteration);
                });
            };
            bench("parse", &|json| parse(json, file_len_bytes).len());
            bench("parse_and_plan", &|json| {
                plan(parse(json, file_len_bytes), Machine::default()).tensors().len()
            });
            let in_place = Machine { in_place: InPlace::host(4 << 20), ..Machine::default() };
            bench("parse_and_plan_in_place", &|json| {
                plan(parse(json, file_len_bytes), in_place.clone()).tensors().len()
            });
            bench("reference_parse", &|json| reference(json).tensors().len());
        }
    }
    group.finish();
}

/// Recognises experts of several formats, and plans them as they are stored and as numbers.
fn recognize(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("quant");
    group.sample_size(10);
    for (format, config, tensors) in FORMATS {
        let checkpoint = experts(tensors);
        let mut configs = Configs::none();
        configs.insert("config.json", config);
        // What small tensors hold, which is the shape of every weight here.
        let shape = [64u64.to_le_bytes(), 256u64.to_le_bytes()].concat();
        let values = |survey: &Survey| {
            let mut values = Values::none();
            for need in survey.needs() {
                values.insert(need.tensor, &shape[..shape.len().min(need.len_bytes as usize)]);
            }
            values
        };
        let run = || {
            let survey =
                Survey::new(&checkpoint, black_box(&configs)).expect("the configuration is well-formed");
            let quantization = survey.recognize(&checkpoint, &values(&survey));
            assert!(quantization.refused().is_empty(), "{format}: {}", quantization.refused()[0].error);
            quantization
        };
        let expected = if format == "plain" { 0 } else { QUANT_TENSOR_COUNT / tensors.len() };
        assert_eq!(run().groups().len(), expected, "{format}");
        group.bench_function(
            BenchmarkId::new(format!("recognize/{format}"), QUANT_TENSOR_COUNT),
            |bencher| {
                bencher.iter(&run);
            },
        );
        let groups = run().shared_groups();
        cut(&mut group, format, &checkpoint, &groups);
        let checkpoint = Arc::new(checkpoint);
        let mut request = Request::all();
        for name in ["stored", "dequantize"] {
            group.bench_function(
                BenchmarkId::new(format!("{name}/{format}"), QUANT_TENSOR_COUNT),
                |bencher| {
                    bencher.iter(|| Plan::new(&checkpoint, black_box(&request), &Machine::default()));
                },
            );
            let (dtype, layout) = (Dtype::Bf16, tensorhaul_plan::Layout::Rows);
            let groups = Arc::clone(&groups);
            request.dequantize = Some(Dequantize { groups, globs: None, dtype, layout, fold: false });
        }
    }
    group.finish();
}

/// Cuts every group: rows 8 to 15 of 64, columns 128 to 255.
fn cut(bench: &mut BenchmarkGroup<'_, WallTime>, format: &str, checkpoint: &Checkpoint, groups: &[Group]) {
    type Cut = fn(&Group, &Checkpoint) -> usize;
    let ways: [(&str, Cut); 3] = [
        ("cut_rows", |group, checkpoint| {
            let window = Window { rows: 8..16, ..Window::all(group) };
            group.cut(checkpoint, &window).expect("any rows can be cut").members.len()
        }),
        ("cut_cols", |group, checkpoint| {
            let window = Window { cols: 128..256, ..Window::all(group) };
            group.cut(checkpoint, &window).expect("any columns can be cut").members.len()
        }),
        ("stored_cols", |group, checkpoint| {
            let window = Window { cols: 128..256, ..Window::all(group) };
            group.stored_slices(checkpoint, &window).expect("whole groups and words").len()
        }),
    ];
    for (name, way) in ways.iter().filter(|_| !groups.is_empty()) {
        bench.bench_function(BenchmarkId::new(format!("{name}/{format}"), groups.len()), |bencher| {
            bencher.iter(|| groups.iter().map(|group| way(group, black_box(checkpoint))).sum::<usize>());
        });
    }
}

/// Prints the most memory that parsing and planning take at once, beside the header's own bytes.
fn memory() {
    let peaks = TENSOR_COUNTS.map(|tensor_count| {
        let (json, file_len_bytes) = moe_header(tensor_count, 7_919);
        let ours = PEAK.of(|| plan(parse(&json, file_len_bytes), Machine::default()));
        let reference = PEAK.of(|| reference(&json));
        let each = |bytes: usize| bytes / tensor_count;
        println!(
            "{tensor_count} tensors: at most {} bytes a tensor, the reference {}",
            each(ours),
            each(reference)
        );
        ours
    });
    let growth = peaks[1] as f64 / peaks[0] as f64;
    let linear = TENSOR_COUNTS[1] as f64 / TENSOR_COUNTS[0] as f64;
    // Tables that double when they are full are up to twice too long, each at counts of its own.
    assert!(growth < 2.0 * linear, "{linear} times the tensors take {growth:.1} times the memory");
}

fn parse(json: &[u8], file_len_bytes: u64) -> Header {
    Header::parse(json, file_len_bytes).expect("the header is well-formed")
}

fn plan(header: Header, machine: Machine) -> Plan {
    let file = File::new("model.safetensors".to_owned(), header);
    let checkpoint = Arc::new(Checkpoint::new(vec![file]).expect("one file's names are its own"));
    Plan::new(&checkpoint, &Request::all(), &machine).expect("all of a checkpoint can be planned")
}

fn reference(json: &[u8]) -> Metadata {
    serde_json::from_slice(json).expect("the header is well-formed")
}

/// Returns the JSON of a header whose entries are listed `step` apart, and the length of its file.
fn moe_header(tensor_count: usize, step: usize) -> (Vec<u8>, u64) {
    const EXPERTS_PER_LAYER: usize = 256;
    let mut start_bytes = 0;
    let entries: Vec<String> = (0..tensor_count)
        .map(|index| {
            let (expert_index, part) = (index / 3, ["w1", "w2", "w3"][index % 3]);
            let (layer, expert) = (expert_index / EXPERTS_PER_LAYER, expert_index % EXPERTS_PER_LAYER);
            let shape = if part == "w2" { "[32,16]" } else { "[16,32]" };
            let end_bytes = start_bytes + 2 * 16 * 32;
            let entry = format!(
                "\"layers.{layer}.experts.{expert}.{part}\":{{\"dtype\":\"BF16\",\
                 \"shape\":{shape},\"data_offsets\":[{start_bytes},{end_bytes}]}}"
            );
            start_bytes = end_bytes;
            entry
        })
        .collect();
    // `step` is prime to both counts, so that each entry is listed once.
    let listed: Vec<&str> = (0..tensor_count).map(|place| &*entries[place * step % tensor_count]).collect();
    // Padded as writers do: behind a header of an odd length, every tensor is misaligned and placed by itself.
    let mut json = format!("{{{}}}", listed.join(",")).into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let file_len_bytes = 8 + json.len() as u64 + start_bytes;
    (json, file_len_bytes)
}

/// Returns a checkpoint of experts, each weight stored as these tensors, in files of 5,000 tensors.
fn experts(tensors: &[(&str, Dtype, &[u64])]) -> Checkpoint {
    const FILE_TENSOR_COUNT: usize = 5_000;
    let parts = ["gate_proj", "up_proj", "down_proj"];
    let all: Vec<(String, Dtype, &[u64])> = (0..QUANT_TENSOR_COUNT / tensors.len())
        .flat_map(|weight| {
            let (expert, part) = (weight / 3, parts[weight % 3]);
            let module = format!("model.layers.{}.mlp.experts.{}.{part}", expert / 128, expert % 128);
            tensors.iter().map(move |(leaf, dtype, shape)| (format!("{module}.{leaf}"), *dtype, *shape))
        })
        .collect();
    let file = |tensors: &[(String, Dtype, &[u64])]| {
        let list: Vec<NewTensor<'_>> =
            tensors.iter().map(|(name, dtype, shape)| NewTensor { name, dtype: *dtype, shape }).collect();
        let bytes = encode(&list, &BTreeMap::new(), 0).expect("names listed once");
        let bits = |list: &NewTensor<'_>| list.shape.iter().product::<u64>() * list.dtype.bits();
        let data_len_bytes: u64 = list.iter().map(|tensor| bits(tensor) / 8).sum();
        parse(&bytes[8..], bytes.len() as u64 + data_len_bytes)
    };
    let files = all.chunks(FILE_TENSOR_COUNT).enumerate();
    let files =
        files.map(|(number, tensors)| File::new(format!("model-{number}.safetensors"), file(tensors)));
    Checkpoint::new(files.collect()).expect("names are listed once")
}

const QUANT_TENSOR_COUNT: usize = 50_000;

/// A format's name, its configuration, and the tensors of a weight.
type Format = (&'static str, &'static str, &'static [(&'static str, Dtype, &'static [u64])]);

const FORMATS: [Format; 5] = [
    ("plain", r#"{"model_type":"mixture"}"#, &[("weight", Dtype::Bf16, &[64, 256])]),
    (
        "fp8_blocks",
        r#"{"quantization_config":{"quant_method":"fp8","weight_block_size":[128,128],"ignored_layers":["lm_head"]}}"#,
        &[("weight", Dtype::F8E4m3, &[64, 256]), ("weight_scale_inv", Dtype::F32, &[1, 2])],
    ),
    (
        "gptq",
        r#"{"quantization_config":{"quant_method":"gptq","bits":4,"group_size":128,"sym":true,
            "dynamic":{"-:.*\\.gate$":{},"+:.*down_proj":{"bits":4}}}}"#,
        &[
            ("g_idx", Dtype::I32, &[256]),
            ("qweight", Dtype::I32, &[32, 64]),
            ("qzeros", Dtype::I32, &[2, 8]),
            ("scales", Dtype::F16, &[2, 64]),
        ],
    ),
    (
        "compressed_tensors",
        r#"{"quantization_config":{"quant_method":"compressed-tensors","format":"pack-quantized",
            "ignore":["lm_head","re:.*mlp.gate$"],"config_groups":{"group_0":{"targets":["Linear"],
            "weights":{"num_bits":4,"symmetric":false,"strategy":"group","group_size":128}}}}}"#,
        &[
            ("weight_shape", Dtype::I64, &[2]),
            ("weight_packed", Dtype::I32, &[64, 32]),
            ("weight_scale", Dtype::Bf16, &[64, 2]),
            ("weight_zero_point", Dtype::I32, &[8, 2]),
        ],
    ),
    (
        "nvfp4",
        r#"{"quantization_config":{"quant_method":"modelopt","quant_algo":"NVFP4","ignore":["*router*","lm_head"]}}"#,
        &[
            ("weight", Dtype::U8, &[64, 128]),
            ("weight_scale", Dtype::F8E4m3, &[64, 16]),
            ("weight_scale_2", Dtype::F32, &[]),
            ("input_scale", Dtype::F32, &[]),
        ],
    ),
];

/// The system's allocator, counting.
struct Peak {
    now_bytes: AtomicUsize,
    peak_bytes: AtomicUsize,
}

#[global_allocator]
static PEAK: Peak = Peak { now_bytes: AtomicUsize::new(0), peak_bytes: AtomicUsize::new(0) };

impl Peak {
    /// Returns the most bytes that `run` had allocated at once, beyond those allocated before. One thread at a time.
    fn of<T>(&self, run: impl FnOnce() -> T) -> usize {
        let before = self.now_bytes.load(Ordering::Relaxed);
        self.peak_bytes.store(before, Ordering::Relaxed);
        drop(run());
        self.peak_bytes.load(Ordering::Relaxed) - before
    }

    fn add(&self, len_bytes: usize) {
        let now = self.now_bytes.fetch_add(len_bytes, Ordering::Relaxed) + len_bytes;
        self.peak_bytes.fetch_max(now, Ordering::Relaxed);
    }
}

// SAFETY: every call goes to the system's allocator unchanged; counting touches no memory of it.
unsafe impl GlobalAlloc for Peak {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.add(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        self.now_bytes.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(start, layout) }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, new_len_bytes: usize) -> *mut u8 {
        self.add(new_len_bytes);
        self.now_bytes.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(start, layout, new_len_bytes) }
    }
}
