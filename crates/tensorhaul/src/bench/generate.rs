//! A checkpoint to measure with, where the caller has none: the names and shapes of a Llama, filled with noise.

use std::fs;
use std::path::{Path, PathBuf};

use tensorhaul_plan::Dtype;

use crate::atomic::write_error;
use crate::error::{Error, Result};
use crate::save::{SaveOptions, SaveTensor, TensorBytes, save};

/// A folder with a checkpoint, removed with everything in it when this is dropped.
#[derive(Debug)]
pub struct TemporaryCheckpoint {
    folder: PathBuf,
}

impl TemporaryCheckpoint {
    /// Writes about `len_bytes` of BF16 tensors, in several files, into a new folder of `parent`.
    ///
    /// # Errors
    /// [`ErrorKind::BadRequest`](crate::ErrorKind::BadRequest) when `len_bytes` is less than
    /// [`LEN_BYTES_MIN`] or more than is free there, or when there is no such folder; the errors of
    /// [`save`]. Nothing is left behind.
    pub fn write(parent: &Path, len_bytes: u64, options: &SaveOptions) -> Result<TemporaryCheckpoint> {
        if len_bytes < LEN_BYTES_MIN {
            return Err(Error::bad_request(format!(
                "a checkpoint of {len_bytes} bytes is too small to measure; the least is {LEN_BYTES_MIN}"
            )));
        }
        let folder = parent.join(format!(".tensorhaul-bench-{}", std::process::id()));
        fs::create_dir(&folder)
            .map_err(|error| write_error("making a folder for a checkpoint", parent, error))?;
        let made = TemporaryCheckpoint { folder };
        made.check_room(parent, len_bytes)?;
        let shard_bytes = len_bytes.div_ceil(FILES).max(LEN_BYTES_MIN / FILES);
        save(&made.folder, llama(len_bytes), &options.clone().max_shard_bytes(shard_bytes))?;
        Ok(made)
    }

    /// Returns the folder.
    pub fn path(&self) -> &Path {
        &self.folder
    }

    fn check_room(&self, parent: &Path, len_bytes: u64) -> Result<()> {
        let looking = |errno: rustix::io::Errno| Error::io("asking for its free space", parent, errno.into());
        let space = rustix::fs::statvfs(&self.folder).map_err(looking)?;
        let free_bytes = space.f_bavail.saturating_mul(space.f_frsize);
        if len_bytes <= free_bytes.saturating_sub(SPARE_BYTES) {
            return Ok(());
        }
        let what = format!(
            "no room for a checkpoint of {len_bytes} bytes: {free_bytes} are free, of which {SPARE_BYTES} stay so"
        );
        Err(Error::bad_request(what).in_file(parent))
    }
}

impl Drop for TemporaryCheckpoint {
    fn drop(&mut self) {
        // Nobody is left to tell; the name shows what it is.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Widths of models to choose from, so that a small checkpoint has layers, too.
struct Width {
    hidden: u64,
    intermediate: u64,
    kv: u64,
    vocab: u64,
}

const WIDTHS: [Width; 3] = [
    Width { hidden: 2048, intermediate: 8192, kv: 512, vocab: 32_000 }, // Layers of Llama 3.2 1B.
    Width { hidden: 512, intermediate: 1408, kv: 128, vocab: 8_000 },
    Width { hidden: 64, intermediate: 176, kv: 32, vocab: 384 },
];

/// The tensors of `LlamaForCausalLM` with tied embeddings: the widest that has two layers or more, and as many of
/// them as fit.
fn llama(len_bytes: u64) -> Vec<SaveTensor<'static>> {
    let len = |tensors: &[SaveTensor<'_>]| tensors.iter().map(|tensor| tensor.bytes.len_bytes()).sum::<u64>();
    let fits = |width: &&Width| len(&outer(width)) + 2 * len(&layer(width, 0)) <= len_bytes;
    let width = WIDTHS.iter().find(fits).unwrap_or(&WIDTHS[WIDTHS.len() - 1]);
    let mut tensors = outer(width);
    let layers = len_bytes.saturating_sub(len(&tensors)) / len(&layer(width, 0));
    tensors.extend((0..layers).flat_map(|number| layer(width, number)));
    tensors
}

fn outer(width: &Width) -> Vec<SaveTensor<'static>> {
    let Width { hidden, vocab, .. } = *width;
    vec![
        tensor("model.embed_tokens.weight".to_owned(), &[vocab, hidden]),
        tensor("model.norm.weight".to_owned(), &[hidden]),
    ]
}

fn layer(width: &Width, number: u64) -> Vec<SaveTensor<'static>> {
    let Width { hidden, intermediate, kv, .. } = *width;
    let weight = |part: &str, shape: &[u64]| tensor(format!("model.layers.{number}.{part}.weight"), shape);
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
}

fn tensor(name: String, shape: &[u64]) -> SaveTensor<'static> {
    let len_bytes = 2 * shape.iter().product::<u64>();
    let seed = name.bytes().fold(len_bytes, |seed, byte| seed.wrapping_mul(31).wrapping_add(byte.into()));
    let bytes = Box::new(Noise { seed, len_bytes });
    SaveTensor { name, dtype: Dtype::Bf16, shape: shape.to_vec(), bytes }
}

/// Bytes that no filesystem and no disk can compress or find twice.
struct Noise {
    seed: u64,
    len_bytes: u64,
}

impl TensorBytes for Noise {
    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn fill(&mut self, offset_bytes: u64, target: &mut [u8]) -> Result<()> {
        for (index, word) in (offset_bytes..).step_by(8).zip(target.chunks_mut(8)) {
            // Any start will do: nobody reads a piece twice.
            let noise = splitmix64(self.seed.wrapping_add(index)).to_le_bytes();
            word.copy_from_slice(&noise[..word.len()]);
        }
        Ok(())
    }
}

/// # Source
/// Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014, figure 14, with the constants of
/// Vigna's `splitmix64.c`.
fn splitmix64(state: u64) -> u64 {
    let z = state.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The least that [`TemporaryCheckpoint::write`] writes.
pub const LEN_BYTES_MIN: u64 = 1 << 20;

/// As many files as checkpoints of some GB have.
const FILES: u64 = 4;

/// Left free for everybody else.
const SPARE_BYTES: u64 = 64 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Model;

    #[test]
    fn checkpoints_have_about_the_length_asked_for_in_several_files_and_go_away() {
        let parent = tempfile::tempdir_in(".").unwrap();
        for len_bytes in [LEN_BYTES_MIN, 30 << 20] {
            let made = TemporaryCheckpoint::write(parent.path(), len_bytes, &SaveOptions::default()).unwrap();
            let model = Model::open(made.path()).unwrap();
            let bytes: u64 = model.checkpoint().tensors().map(|tensor| tensor.info.len_bytes()).sum();
            assert!(bytes <= len_bytes && bytes > len_bytes / 2, "{bytes} of {len_bytes}");
            assert!((3..=8).contains(&model.checkpoint().files().len()));
            drop(made);
            assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn more_than_is_free_and_too_little_are_refused_and_leave_nothing() {
        let parent = tempfile::tempdir_in(".").unwrap();
        for (len_bytes, word) in [(1 << 60, "no room"), (0, "the least is 1048576")] {
            let refused = TemporaryCheckpoint::write(parent.path(), len_bytes, &SaveOptions::default());
            let line = refused.unwrap_err().one_line();
            assert!(line.contains(word), "{line}");
        }
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }
}
