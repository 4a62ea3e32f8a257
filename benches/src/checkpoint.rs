//! Checkpoints to load: generated ones with the names and shapes of real models, or one the caller names.

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::{Metadata, View, serialize_to_file};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// A folder of safetensors files, and what a run that read them must have seen.
pub struct Checkpoint {
    /// The folder.
    pub folder: PathBuf,
    /// Its safetensors files, by name.
    pub paths: Vec<PathBuf>,
    /// Bytes of all files.
    pub file_bytes: u64,
    /// Bytes of all tensors.
    pub payload_bytes: u64,
    /// Number of tensors.
    pub tensor_count: usize,
    /// Sum of [`block_checksum`] over the blocks of all files.
    pub files_checksum: u64,
    /// Sum of [`tensor_checksum`] over all tensors.
    pub tensors_checksum: u64,
}

/// What tensors a generated checkpoint has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Those of a Llama: a few hundred kB to hundreds of MB each.
    FewLarge,
    /// 10,000 of equal size, as experts of a mixture are.
    ManySmall,
}

impl Checkpoint {
    /// Writes a checkpoint of about `len_bytes` to `folder`, the same bytes whenever the length is the same.
    ///
    /// # Errors
    /// I/O errors, and those of the reference crate, which writes the files.
    pub fn generate(folder: &Path, shape: Shape, len_bytes: u64) -> io::Result<Checkpoint> {
        fs::create_dir_all(folder)?;
        let tensors = match shape {
            Shape::FewLarge => llama(len_bytes),
            Shape::ManySmall => experts(len_bytes),
        };
        let total: usize = tensors.iter().map(Noise::data_len).sum();
        let mut files: Vec<Vec<Noise>> = vec![Vec::new()];
        let mut written = 0;
        for tensor in tensors {
            if written * FILE_COUNT >= total * files.len() {
                files.push(Vec::new());
            }
            written += tensor.data_len();
            files.last_mut().expect("there is always one").push(tensor);
        }
        let count = files.len();
        for (index, tensors) in files.into_iter().enumerate() {
            let path = folder.join(format!("model-{:05}-of-{count:05}.safetensors", index + 1));
            let named = tensors.into_iter().map(|tensor| (tensor.name.clone(), tensor));
            serialize_to_file(named, None, &path).map_err(io::Error::other)?;
        }
        Checkpoint::find(folder)
    }

    /// Reads the checksums of the files in a folder, by plain reads and the reference crate's parser.
    ///
    /// # Errors
    /// I/O errors, and a folder without safetensors files.
    pub fn find(folder: &Path) -> io::Result<Checkpoint> {
        let entries = fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path()));
        let mut paths = entries.collect::<io::Result<Vec<_>>>()?;
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
        paths.sort();
        if paths.is_empty() {
            return Err(io::Error::other(format!("{}: holds no safetensors file", folder.display())));
        }
        let mut checkpoint = Checkpoint {
            folder: folder.to_owned(),
            paths,
            file_bytes: 0,
            payload_bytes: 0,
            tensor_count: 0,
            files_checksum: 0,
            tensors_checksum: 0,
        };
        for (index, path) in checkpoint.paths.clone().iter().enumerate() {
            checkpoint.add_blocks(index, path)?;
            checkpoint.add_tensors(path)?;
        }
        Ok(checkpoint)
    }

    /// Opens every file for ordinary reads, with its length.
    ///
    /// # Errors
    /// I/O errors.
    pub fn open(&self) -> io::Result<Vec<(File, u64)>> {
        let open = |path: &PathBuf| {
            let file = File::open(path)?;
            let len_bytes = file.metadata()?.len();
            Ok((file, len_bytes))
        };
        self.paths.iter().map(open).collect()
    }

    fn add_blocks(&mut self, index: usize, path: &Path) -> io::Result<()> {
        let (mut file, mut block) = (File::open(path)?, Vec::with_capacity(BLOCK_LEN_BYTES));
        let mut offset_bytes = 0;
        while file.by_ref().take(BLOCK_LEN_BYTES as u64).read_to_end(&mut block)? > 0 {
            self.files_checksum =
                self.files_checksum.wrapping_add(block_checksum(index, offset_bytes, &block));
            offset_bytes += block.len() as u64;
            block.clear();
        }
        self.file_bytes += offset_bytes;
        Ok(())
    }

    fn add_tensors(&mut self, path: &Path) -> io::Result<()> {
        let mut file = File::open(path)?;
        let mut len_bytes = [0; 8];
        file.read_exact(&mut len_bytes)?;
        let mut header = vec![0; u64::from_le_bytes(len_bytes) as usize];
        file.read_exact(&mut header)?;
        let metadata: Metadata = serde_json::from_slice(&header)?;
        let mut bytes = Vec::new();
        for name in metadata.offset_keys() {
            let info = metadata.info(&name).expect("the name is one of its own");
            let (begin, end) = info.data_offsets;
            bytes.resize(end - begin, 0); // Tensors lie back to back, in the order of `offset_keys`.
            file.read_exact(&mut bytes)?;
            self.tensors_checksum = self.tensors_checksum.wrapping_add(tensor_checksum(&name, &bytes));
            self.payload_bytes += bytes.len() as u64;
            self.tensor_count += 1;
        }
        Ok(())
    }
}

/// Returns what a block of a file adds to the checksum of all files. `offset_bytes` is a multiple of
/// [`BLOCK_LEN_BYTES`], and the block as long, or shorter at the file's end.
pub fn block_checksum(file: usize, offset_bytes: u64, bytes: &[u8]) -> u64 {
    xxh3_64_with_seed(bytes, (file as u64) << 48 | offset_bytes)
}

/// Returns what a tensor adds to the checksum of all tensors.
pub fn tensor_checksum(name: &str, bytes: &[u8]) -> u64 {
    xxh3_64_with_seed(bytes, xxh3_64(name.as_bytes()))
}

/// The unit of checksums of files; all reads of ceilings are cut at multiples of it or hash at their end.
pub const BLOCK_LEN_BYTES: usize = 128 << 10;

/// A tensor of bytes that compress as little as trained weights do, made when they are written.
struct Noise {
    name: String,
    shape: Vec<usize>,
}

impl View for Noise {
    fn dtype(&self) -> Dtype {
        Dtype::BF16
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut state = xxh3_64(self.name.as_bytes());
        let mut bytes = vec![0; self.data_len()];
        for word in bytes.chunks_mut(8) {
            word.copy_from_slice(&split_mix(&mut state).to_le_bytes()[..word.len()]);
        }
        bytes.into()
    }

    fn data_len(&self) -> usize {
        2 * self.shape.iter().product::<usize>()
    }
}

/// # Source
/// Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014, figure 17.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Widths of models to choose from, so that a small checkpoint has layers too.
struct Width {
    hidden: usize,
    intermediate: usize,
    kv: usize,
    vocab: usize,
}

const WIDTHS: &[Width] = &[
    Width { hidden: 2048, intermediate: 8192, kv: 512, vocab: 32_000 }, // Layers of Llama 3.2 1B.
    Width { hidden: 512, intermediate: 1408, kv: 128, vocab: 8_000 },
    Width { hidden: 64, intermediate: 176, kv: 32, vocab: 384 },
];

/// Names and shapes of `LlamaForCausalLM` with tied embeddings, with as many layers as fill the length.
fn llama(len_bytes: u64) -> Vec<Noise> {
    let layer = |width: &Width, layer: usize| {
        let Width { hidden, intermediate, kv, .. } = *width;
        let weight = move |part: &str, shape: &[usize]| Noise {
            name: format!("model.layers.{layer}.{part}.weight"),
            shape: shape.to_vec(),
        };
        vec![
            weight("input_layernorm", &[hidden]),
            weight("mlp.down_proj", &[hidden, intermediate]),
            weight("mlp.gate_proj", &[intermediate, hidden]),
            weight("mlp.up_proj", &[intermediate, hidden]),
            weight("post_attention_layernorm", &[hidden]),
            weight("self_attn.k_proj", &[kv, hidden]),
            weight("self_attn.o_proj", &[hidden, hidden]),
            weight("self_attn.q_proj", &[hidden, hidden]),
            weight("self_attn.v_proj", &[kv, hidden]),
        ]
    };
    let len = |tensors: &[Noise]| tensors.iter().map(Noise::data_len).sum::<usize>() as u64;
    let outer = |width: &Width| {
        let Width { hidden, vocab, .. } = *width;
        let embed = Noise { name: "model.embed_tokens.weight".to_owned(), shape: vec![vocab, hidden] };
        vec![embed, Noise { name: "model.norm.weight".to_owned(), shape: vec![hidden] }]
    };
    let fits = |width: &&Width| len(&outer(width)) + 2 * len(&layer(width, 0)) <= len_bytes;
    let width = WIDTHS.iter().find(fits).unwrap_or(&WIDTHS[WIDTHS.len() - 1]);
    let mut tensors = outer(width);
    let layers = (len_bytes.saturating_sub(len(&tensors)) / len(&layer(width, 0))).max(1);
    tensors.extend((0..layers as usize).flat_map(|number| layer(width, number)));
    tensors
}

/// Names of a mixture of experts, of 1 MB and less each where the length is 10 GB and less.
fn experts(len_bytes: u64) -> Vec<Noise> {
    const COLUMNS: usize = 64;
    let rows = (len_bytes as usize / SMALL_COUNT / (2 * COLUMNS)).max(1);
    let named = |index: usize| {
        let (expert, part) = (index / 3, ["down_proj", "gate_proj", "up_proj"][index % 3]);
        let (layer, expert) = (expert / 128, expert % 128);
        let name = format!("model.layers.{layer}.mlp.experts.{expert}.{part}.weight");
        Noise { name, shape: vec![rows, COLUMNS] }
    };
    (0..SMALL_COUNT).map(named).collect()
}

const SMALL_COUNT: usize = 10_000;

/// Real checkpoints come in several files, and the queue must not drain between them.
const FILE_COUNT: usize = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_length_gives_the_same_checkpoint_of_about_that_length() {
        let folder = tempfile::tempdir().unwrap();
        for (shape, tensor_count) in [(Shape::FewLarge, None), (Shape::ManySmall, Some(SMALL_COUNT))] {
            let make = |name: &str| Checkpoint::generate(&folder.path().join(name), shape, 4 << 20).unwrap();
            let (first, second) = (make("first"), make("second"));
            assert_eq!(first.tensors_checksum, second.tensors_checksum);
            assert_eq!(first.files_checksum, second.files_checksum);
            assert_eq!(first.paths.len(), FILE_COUNT);
            assert!((2 << 20..5 << 20).contains(&first.payload_bytes), "{}", first.payload_bytes);
            assert_eq!(tensor_count.unwrap_or(first.tensor_count), first.tensor_count);
        }
    }
}
