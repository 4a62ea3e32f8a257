//! What the tests share: small checkpoints on real filesystems, an independent reader of them, dice, and a
//! look at the process from outside.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use safetensors::SafeTensors;
use tempfile::TempDir;
use tensorhaul::{Dtype, LoadOptions, Loaded, Model, Report, Tensor};
use tensorhaul_io::{Residency, probe};

/// A tensor to be written.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
    pub(crate) bytes: Vec<u8>,
}

/// Makes a tensor whose bytes are noise of its own.
pub(crate) fn stored(name: &str, dtype: Dtype, shape: &[u64]) -> Stored {
    let len_bytes = dtype.len_bytes(shape.iter().product()).expect("a tensor of a test has whole bytes");
    let seed = name.bytes().fold(len_bytes + 1, |seed, byte| seed.wrapping_mul(31) + u64::from(byte));
    let mut dice = Dice(seed);
    let mut bytes: Vec<u8> = (0..len_bytes.div_ceil(8)).flat_map(|_| dice.roll().to_le_bytes()).collect();
    bytes.truncate(len_bytes as usize);
    Stored { name: name.to_owned(), dtype, shape: shape.to_vec(), bytes }
}

/// Writes a header as its format's page describes it, and the data behind it, which starts `data_phase`
/// bytes behind a multiple of 4096.
pub(crate) fn encode(tensors: &[Stored], data_phase: u64) -> Vec<u8> {
    let mut offset = 0;
    let entries = tensors.iter().map(|tensor| {
        let (begin, end) = (offset, offset + tensor.bytes.len());
        offset = end;
        let name = serde_json::to_string(&tensor.name).expect("a string is JSON");
        format!(
            "{name}:{{\"dtype\":\"{}\",\"shape\":{:?},\"data_offsets\":[{begin},{end}]}}",
            tensor.dtype, tensor.shape
        )
    });
    let mut json = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
    while (8 + json.len()) as u64 % 4096 != data_phase % 4096 {
        json.push(' ');
    }
    let mut file = (json.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(json.as_bytes());
    tensors.iter().for_each(|tensor| file.extend_from_slice(&tensor.bytes));
    file
}

/// A file of a checkpoint: its name, its tensors, where its data starts modulo 4096.
pub(crate) type Shard = (&'static str, Vec<Stored>, u64);

/// Three files, 7 MB, with everything that can be awkward: a data start that is aligned, odd and in between,
/// misaligned tensors, scalars, empty tensors, every element type, layers that are arenas of their own.
pub(crate) fn awkward() -> Vec<Shard> {
    let first = vec![
        stored("model.embed_tokens.weight", Dtype::F32, &[300, 1000]),
        stored("model.norm.weight", Dtype::Bf16, &[777]),
        stored("scalar", Dtype::F16, &[]),
        stored("empty", Dtype::F32, &[0, 5]),
        stored("model.layers.0.q.weight", Dtype::Bf16, &[512, 1024]),
        stored("model.layers.0.q.bias", Dtype::F16, &[13]),
    ];
    let second = vec![
        stored("model.layers.1.q.weight", Dtype::Bf16, &[512, 2200]),
        stored("model.layers.1.empty", Dtype::U8, &[3, 0]),
        stored("model.layers.1.k.weight", Dtype::F32, &[129]),
        stored("one byte", Dtype::U8, &[1]),
        stored("model.layers.1.v.weight", Dtype::F64, &[100, 3]),
        stored("model.layers.1.codes", Dtype::I64, &[40, 40]),
    ];
    let mut third: Vec<Stored> =
        Dtype::ALL.iter().map(|dtype| stored(dtype.name(), *dtype, &[3, 8])).collect();
    third.insert(5, stored("shifts what follows", Dtype::U8, &[3]));
    third.push(stored("model.layers.2.mlp.weight", Dtype::F32, &[600, 1000]));
    third.push(stored("last byte", Dtype::I8, &[1, 1]));
    vec![
        ("model-00001-of-00003.safetensors", first, 0),
        ("model-00002-of-00003.safetensors", second, 1),
        ("model-00003-of-00003.safetensors", third, 2080),
    ]
}

/// A folder that is removed with the test.
pub(crate) struct Folder(TempDir);

impl Folder {
    /// On the disk that holds the build.
    pub(crate) fn on_disk() -> Folder {
        Folder(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("the target folder can be written"))
    }

    /// On a filesystem in memory; `None`, with a message, where there is none.
    pub(crate) fn in_memory() -> Option<Folder> {
        let folder = tempfile::tempdir_in("/dev/shm").map_err(|error| skip(&format!("/dev/shm: {error}")));
        folder.ok().map(Folder)
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Writes a file, on the disk before this returns (a dirty page cannot be evicted), and an hour old (a
    /// later write must show, however coarse the filesystem's clock).
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path().join(name);
        let mut file = File::create(&path).expect("the folder can be written");
        file.write_all(bytes).expect("the disk has room");
        file.set_modified(SystemTime::now() - Duration::from_secs(3600)).expect("the file is ours");
        file.sync_all().expect("the disk takes it");
        path
    }

    /// Writes files and an index of them, and returns the files' paths.
    pub(crate) fn checkpoint(&self, shards: &[Shard]) -> Vec<PathBuf> {
        let listed = shards
            .iter()
            .flat_map(|(file, tensors, _)| tensors.iter().map(|tensor| (tensor.name.as_str(), *file)));
        self.index(&listed.collect::<Vec<_>>());
        shards.iter().map(|(file, tensors, phase)| self.write(file, &encode(tensors, *phase))).collect()
    }

    /// Writes an index that lists tensors and their files.
    pub(crate) fn index(&self, listed: &[(&str, &str)]) -> PathBuf {
        let entries = listed.iter().map(|(tensor, file)| {
            let text = |text| serde_json::to_string(text).expect("a string is JSON");
            format!("{}: {}", text(tensor), text(file))
        });
        let json = format!("{{\"weight_map\": {{{}}}}}", entries.collect::<Vec<_>>().join(", "));
        self.write("model.safetensors.index.json", json.as_bytes())
    }
}

/// What a checkpoint holds by the reading of the `safetensors` crate: dtype, shape, bytes.
pub(crate) type Reference = BTreeMap<String, (String, Vec<u64>, Vec<u8>)>;

/// Reads files with the `safetensors` crate.
pub(crate) fn reference(paths: &[PathBuf]) -> Reference {
    let files: Vec<Vec<u8>> = paths.iter().map(|path| fs::read(path).expect("the file is there")).collect();
    reference_of(files.iter().map(Vec::as_slice))
}

/// Reads files in memory with the `safetensors` crate.
pub(crate) fn reference_of<'f>(files: impl IntoIterator<Item = &'f [u8]>) -> Reference {
    let mut reference = Reference::new();
    for file in files {
        for (name, view) in SafeTensors::deserialize(file).expect("the reference reads it").tensors() {
            let shape = view.shape().iter().map(|dim| *dim as u64).collect();
            reference.insert(name, (view.dtype().to_string(), shape, view.data().to_vec()));
        }
    }
    reference
}

/// Checks that tensors are what the reference read, all of them and nothing else.
pub(crate) fn assert_same<'t>(
    tensors: impl IntoIterator<Item = (&'t str, &'t Tensor)>,
    reference: &Reference,
    context: &str,
) {
    let mut count = 0;
    for (name, tensor) in tensors {
        let (dtype, shape, bytes) = &reference[name];
        assert_eq!(tensor.dtype().name(), dtype, "{context}: {name}");
        assert_eq!(tensor.shape(), shape, "{context}: {name}");
        assert!(
            tensor.bytes().expect("the host reads its memory") == bytes,
            "{context}: {name}: the bytes differ"
        );
        count += 1;
    }
    assert_eq!(count, reference.len(), "{context}: as many tensors as the reference has");
}

/// Checks what must hold between the figures of any report of a finished load.
pub(crate) fn assert_consistent(report: &Report, staging_bytes: u64, context: &str) {
    let context = format!("{context}: {report:?}");
    assert!(report.promised.payload_bytes == report.bytes, "{context}");
    assert!(report.peak_staging_bytes <= report.promised.peak_staging_bytes, "{context}");
    assert!(report.promised.peak_staging_bytes <= staging_bytes, "{context}");
    assert!(report.peak_host_bytes <= report.promised.peak_host_bytes, "{context}");
    assert!(report.promised.read_bytes >= report.bytes || report.reads == 0, "{context}");
    assert_eq!(report.bytes_in_place, report.promised.in_place_bytes, "{context}");
    assert_eq!(report.reads, report.promised.reads, "{context}");
    assert!(
        report.requests >= report.reads && report.system_calls >= u64::from(report.reads > 0),
        "{context}"
    );
    assert!(report.bytes_direct <= report.promised.read_bytes, "{context}");
    if report.resident {
        assert_eq!(report.bytes_hot + report.bytes_cold, report.bytes, "{context}");
    }
    if report.handover == "private" {
        assert!(report.promised.target_bytes >= report.bytes, "{context}");
        assert!(report.resident && report.peak_host_bytes >= report.bytes, "{context}");
    }
}

/// What the page cache holds of the files when a load begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cache {
    Hot,
    Cold,
}

/// Opens and loads with the files in the page cache, or out of it; `None`, with a message, where the system keeps
/// what it is told to drop, or does not tell.
///
/// A system may also reclaim pages between the warming and the load (DAMON does so without memory being short), so a
/// load that found another state than was arranged is done again.
pub(crate) fn load_with(
    cache: Cache,
    path: &Path,
    files: &[PathBuf],
    options: &LoadOptions,
) -> Option<Loaded> {
    if files.iter().any(|file| residency(file) == Residency::Unknown) {
        skip("hot and cold loads: the filesystem does not tell what of it the page cache holds");
        return None;
    }
    for _ in 0..ATTEMPTS {
        let model = Model::open(path).expect("the checkpoint is well-formed");
        for file in files {
            warm(file, 0, file.metadata().expect("the file is there").len());
        }
        if cache == Cache::Cold && !files.iter().all(|file| evict(file)) {
            return None;
        }
        let loaded = model.load(options).unwrap_or_else(|error| panic!("{cache:?}, {options:?}: {error:?}"));
        let Report { bytes, bytes_hot, bytes_cold, resident, .. } = loaded.report;
        let is_as_arranged = match cache {
            Cache::Hot => bytes_cold == 0,
            Cache::Cold => bytes_hot <= bytes / 10, // A mapped load may find the header's page, and its read-ahead.
        };
        if is_as_arranged || !resident {
            return Some(loaded);
        }
    }
    panic!("{ATTEMPTS} loads found the page cache other than {cache:?}: {options:?}");
}

/// Drops a file's pages from the page cache; false, with a message, where the system keeps them.
pub(crate) fn evict(path: &Path) -> bool {
    let file = File::open(path).expect("the file is there");
    let filesystem = probe::filesystem(&file).unwrap_or("its filesystem");
    let len_bytes = file.metadata().expect("an open file has metadata").len();
    let attempts = if filesystem == "tmpfs" { 0 } else { 100 };
    for _ in 0..attempts {
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("advice is taken");
        match probe::cached_bytes(&file, 0, len_bytes) {
            Some(0) | None => return true,
            Some(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
    skip(&format!("cold loads: the page cache keeps what it is told to drop of {filesystem}"));
    false
}

fn residency(path: &Path) -> Residency {
    let file = File::open(path).expect("the file is there");
    probe::residency(&file, 0, file.metadata().expect("an open file has metadata").len())
}

/// Brings a range of a file into the page cache, and as little else as the system allows.
pub(crate) fn warm(path: &Path, offset_bytes: u64, len_bytes: u64) {
    use std::os::unix::fs::FileExt;
    let file = File::open(path).expect("the file is there");
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).expect("advice is taken");
    let mut bytes = vec![0; len_bytes as usize];
    file.read_exact_at(&mut bytes, offset_bytes).expect("the range is in the file");
}

/// Says, once, that a check was not made, and why.
pub(crate) fn skip(why: &str) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    if SAID.lock().unwrap_or_else(PoisonError::into_inner).insert(why.to_owned()) {
        eprintln!("skipped: {why}");
    }
}

/// Seeded dice.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    /// Dice from a seed that is printed, and taken back from `TENSORHAUL_TEST_SEED`.
    pub(crate) fn printed() -> Dice {
        let given = env::var("TENSORHAUL_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let now = || SystemTime::UNIX_EPOCH.elapsed().map_or(0, |elapsed| elapsed.as_nanos() as u64);
        let seed = given.unwrap_or_else(now);
        println!("TENSORHAUL_TEST_SEED={seed} runs this again");
        Dice(seed)
    }

    /// # Source
    /// Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014.
    pub(crate) fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Rolls a number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.roll() % end
    }

    /// Picks one of several.
    pub(crate) fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize].clone()
    }
}

/// What a process holds that a load must give back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Census {
    threads: usize,
    descriptors: usize,
}

impl Census {
    /// Counts threads and descriptors. Only a process that runs one test can compare two of these.
    pub(crate) fn take() -> Census {
        let count = |path| fs::read_dir(path).expect("Linux has /proc").count();
        Census { threads: count("/proc/self/task"), descriptors: count("/proc/self/fd") }
    }

    /// Waits until the process holds what it held then; a thread that was joined may take a moment to vanish.
    pub(crate) fn comes_back(self, context: &str) {
        let deadline = Instant::now() + GIVE_BACK;
        loop {
            let now = Census::take();
            if now == self {
                return;
            }
            assert!(Instant::now() < deadline, "{context}: {now:?}, before it was {self:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Returns a line of /proc/self/status that counts memory, in bytes.
pub(crate) fn memory_bytes(line: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("Linux has /proc");
    let value = status.lines().find_map(|found| found.strip_prefix(line)?.strip_prefix(':'));
    let kib = value
        .and_then(|value| value.trim().strip_suffix("kB"))
        .and_then(|kib| kib.trim().parse::<u64>().ok());
    kib.expect("the kernel counts memory in kB") * 1024
}

/// Runs a test's body in a process where nothing else runs: this binary again, with this test alone.
///
/// `test` is the test's full name, as `--list` prints it.
pub(crate) fn in_own_process(test: &str, body: impl FnOnce()) {
    if env::var_os(OWN_PROCESS).is_some() {
        return body();
    }
    let binary = env::current_exe().expect("a test knows its binary");
    assert_passes_alone(Command::new(binary), test);
}

/// Runs a command that ends in this binary, so that it runs one test alone.
pub(crate) fn assert_passes_alone(mut command: Command, test: &str) {
    let output = command
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env(OWN_PROCESS, test)
        .output()
        .expect("the test's binary runs");
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    text.lines().filter(|line| line.contains("skipped:")).for_each(|line| eprintln!("{line}"));
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{test} in its own process: {}\n{text}",
        output.status
    );
}

/// Tells whether this process was started to run one test alone.
pub(crate) fn is_own_process() -> bool {
    env::var_os(OWN_PROCESS).is_some()
}

/// A file in memory: its name and its bytes.
pub(crate) type MemoryFile = (String, Arc<[u8]>);

/// Turns shards into files in memory.
pub(crate) fn in_memory_files(shards: &[Shard]) -> Vec<MemoryFile> {
    let file = |(name, tensors, phase): &Shard| ((*name).to_owned(), encode(tensors, *phase).into());
    shards.iter().map(file).collect()
}

/// How often a check is made that the system may disturb.
pub(crate) const ATTEMPTS: u32 = 50;

/// Where a test's own process sees that it is one.
const OWN_PROCESS: &str = "TENSORHAUL_TEST_OWN_PROCESS";

/// Far beyond what any thread takes to end; only a leak waits this long.
pub(crate) const GIVE_BACK: Duration = Duration::from_secs(30);
