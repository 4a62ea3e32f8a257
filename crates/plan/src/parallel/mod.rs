//! Tensor, pipeline and expert parallelism: from a model's configuration, rules and a rank's place to the [`Assembly`](crate::Assembly) of just what that
//! rank needs.
//!
//! [`Rules`] say, as data, what ranks have of each tensor; a [`Partition`] matches them with the tensors of a checkpoint, once; and a [`Share`] is
//! what one of the [`Ranks`] has. Words are Megatron's: a column-parallel weight `[out, in]` is cut along `out`, a row-parallel one along `in`.
//!
//! # Example
//! ```
//! use tensorhaul_plan::parallel::{ModelConfig, Partition, Ranks, Rules, Setup};
//! use tensorhaul_plan::{Checkpoint, DeviceId, File, Header};
//!
//! let json = br#"{"model.layers.0.mlp.up_proj.weight":{"dtype":"BF16","shape":[64,8],"data_offsets":[0,1024]}}"#;
//! let header = Header::parse(json, 8 + json.len() as u64 + 1024)?;
//! let checkpoint = Checkpoint::new(vec![File::new("model.safetensors", header)])?;
//!
//! let config = ModelConfig::parse(br#"{"architectures":["LlamaForCausalLM"],"num_hidden_layers":1}"#)?;
//! let rules = Rules::of(&config)?;
//! let partition = Partition::new(&checkpoint, &config, &rules, &Setup::default())?;
//! let share = partition.share(&Ranks::alone().tp(3, 4), DeviceId::Host)?;
//! assert_eq!(*share.assembly.tensors[0].shape, [16, 8]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod config;
mod cut;
mod error;
mod fit;
mod fuse;
mod huggingface;
mod packed;
mod partition;
mod pattern;
mod ranks;
mod rules;
mod share;
mod summary;
mod table;

pub use config::ModelConfig;
pub use error::{NAMED_MAX, ParallelError, Unfit};
pub use fuse::Fuse;
pub use partition::{Partition, Setup};
pub use ranks::{Layers, Ranks};
pub use rules::{Rules, Unmatched};
pub use share::Share;
pub use summary::{Kept, Kind, Summary};
