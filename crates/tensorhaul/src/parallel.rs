//! Ranks: which part of a model each needs, and what that makes of a request.

use std::fmt;
use std::fs;
use std::io;
use std::mem;
use std::num::NonZero;
use std::sync::Arc;
use std::thread;

use serde::Serialize;
pub use tensorhaul_plan::Unfused;
pub use tensorhaul_plan::parallel::{Fuse, Layers, ParallelError, Ranks, Rules, Unmatched};
pub use tensorhaul_plan::parallel::{Kept, Kind, Summary};
use tensorhaul_plan::parallel::{ModelConfig, Partition, Setup};
use tensorhaul_plan::{Assembly, Dequantize, DeviceId, OverRead, Padding, Plan, Promised, Request, Select};

use crate::error::{Error, ErrorKind, Result};
use crate::locate::read_limited;
use crate::model::{Inner, Model, Source};
use crate::options::LoadOptions;
use crate::private::{self, Asking};
use crate::report::Fallback;

/// Whose parts of a model are loaded, and by which rules it is cut.
///
/// # Example
/// ```no_run
/// use tensorhaul::parallel::{Fuse, Parallel, Ranks};
/// use tensorhaul::{DeviceId, LoadOptions, Model, Request};
///
/// let mut request = Request::all();
/// request.device = DeviceId::Cuda(0);
/// let rank = Parallel::rank(Ranks::alone().tp(3, 8)).fuse(Fuse::All);
/// let loaded = Model::open("org/model")?.load(&LoadOptions::default().request(request).parallel(rank))?;
/// let qkv = loaded.tensors.get("model.layers.0.self_attn.qkv_proj.weight").unwrap(); // Rank 3's rows of q, k and v.
/// # Ok::<(), tensorhaul::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Parallel {
    shares: Vec<(Ranks, Option<DeviceId>)>,
    rules: Option<Rules>,
    unmatched: Option<Unmatched>,
    fuse: Fuse,
}

impl Parallel {
    /// Loads what one rank needs, onto the request's device.
    pub fn rank(ranks: Ranks) -> Parallel {
        Parallel { shares: vec![(ranks, None)], rules: None, unmatched: None, fuse: Fuse::No }
    }

    /// Loads what several ranks need in one process, each onto a device of its own; what several of them read is read once.
    pub fn on_devices(shares: impl IntoIterator<Item = (Ranks, DeviceId)>) -> Parallel {
        let shares = shares.into_iter().map(|(ranks, device)| (ranks, Some(device))).collect();
        Parallel { shares, ..Parallel::rank(Ranks::alone()) }
    }

    /// Cuts by these rules. Default: those of the architecture that the model's `config.json` names. Patterns of rules that were
    /// [given as text](Rules::parse) and that no tensor has are among the report's fallbacks.
    pub fn rules(self, rules: Rules) -> Self {
        Parallel { rules: Some(rules), ..self }
    }

    /// Says what becomes of tensors that no rule names. Default: what the rules say, which mostly is an error.
    pub fn unmatched(self, unmatched: Unmatched) -> Self {
        Parallel { unmatched: Some(unmatched), ..self }
    }

    /// Puts tensors side by side where they end up: q, k and v as one, gate and up as one, experts as one stack. What [`Fuse::All`] cannot fuse is
    /// among the report's fallbacks. Default: none.
    pub fn fuse(self, fuse: Fuse) -> Self {
        Parallel { fuse, ..self }
    }
}

impl fmt::Display for Parallel {
    /// Prints the ranks, such as `tp 0/8, pp 0/1, ep 0/1`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, (ranks, _)) in self.shares.iter().enumerate() {
            write!(f, "{}{ranks}", if number == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

/// What a rank would load.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct RankPlan {
    /// Whose plan it is.
    pub ranks: Ranks,
    /// Number of tensors of the result.
    pub tensors: u64,
    /// What the load promises.
    pub promised: Promised,
    /// Tensors that account for what is read beyond the request's bound; none where it is kept. See [`tensorhaul_plan::Plan::over_reads`].
    pub over_reads: Vec<OverRead>,
    /// What was to be fused and is not.
    pub unfused: Vec<Unfused>,
    /// Patterns of the caller's own rules that no tensor of the model has.
    pub unused_rules: Vec<String>,
}

impl Model {
    /// Plans what each of these ranks would load, without doing it, on as many threads as there are processors.
    ///
    /// # Errors
    /// As [`Model::plan`].
    pub fn plan_ranks(
        &self,
        options: &LoadOptions,
        ranks: impl IntoIterator<Item = Ranks>,
    ) -> Result<Vec<RankPlan>> {
        let parallel = options.parallel.clone().unwrap_or_else(|| Parallel::rank(Ranks::alone()));
        let plan = |ranks: Ranks| {
            let one = Parallel { shares: vec![(ranks.clone(), None)], ..parallel.clone() };
            let plan = private::plan(&self.inner, &options.clone().parallel(one), Asking::Nobody)?;
            Ok(RankPlan {
                ranks,
                tensors: plan.tensors().len() as u64,
                promised: *plan.promised(),
                over_reads: plan.over_reads().to_vec(),
                unfused: plan.unfused().to_vec(),
                unused_rules: plan.unused_rules().to_vec(),
            })
        };
        let ranks: Vec<Ranks> = ranks.into_iter().collect();
        let threads = thread::available_parallelism().map_or(1, NonZero::get);
        // Ranks take about as long as one another.
        let some = ranks.chunks(ranks.len().div_ceil(threads).max(1));
        let plan_some = |some: &[Ranks]| some.iter().cloned().map(plan).collect::<Result<Vec<_>>>();
        let plans: Result<Vec<_>> = thread::scope(|scope| {
            let threads: Vec<_> = some.map(|some| scope.spawn(move || plan_some(some))).collect();
            threads.into_iter().map(|thread| thread.join().expect("planning does not panic")).collect()
        });
        Ok(plans?.into_iter().flatten().collect())
    }

    /// Returns what each of these ranks has, by the rules and fused tensors of `options`: what ranks that share their reading pass to
    /// [`load_shared`](Model::load_shared), with the same options.
    ///
    /// # Errors
    /// As [`Model::plan`].
    pub fn assemblies(
        &self,
        options: &LoadOptions,
        ranks: impl IntoIterator<Item = Ranks>,
    ) -> Result<Vec<Assembly>> {
        let parallel = options.parallel.clone().unwrap_or_else(|| Parallel::rank(Ranks::alone()));
        let request = private::request(&self.inner, &LoadOptions { parallel: None, ..options.clone() })?;
        refuse_parts(&self.inner)?;
        let ranks: Vec<Ranks> = ranks.into_iter().collect();
        let tp_size = ranks.iter().map(|ranks| ranks.tp_size).max().unwrap_or(1);
        parallel.with_partition(&self.inner, request.dequantize.as_ref(), tp_size, |partition| {
            let assembly = |ranks: &Ranks| {
                let share = partition.share(ranks, request.device);
                Ok(share.map_err(|error| parallel_error(error, &self.inner))?.assembly)
            };
            ranks.iter().map(assembly).collect()
        })
    }

    /// Sums up what a rank has of the tensors that are selected, by their rules.
    ///
    /// # Errors
    /// As [`Model::plan`].
    pub fn describe_rank(&self, options: &LoadOptions, ranks: &Ranks) -> Result<Summary> {
        let model = &*self.inner;
        let parallel = options.parallel.clone().unwrap_or_else(|| Parallel::rank(Ranks::alone()));
        // Which stored tensors the names of the result need is not known yet.
        let mut whole = LoadOptions { parallel: None, ..options.clone() };
        let select = mem::replace(&mut whole.request.select, Select::All);
        let mut request = private::request(model, &whole)?;
        request.select = select;
        parallel.with_partition(model, request.dequantize.as_ref(), ranks.tp_size, |partition| {
            let share =
                partition.share(ranks, request.device).map_err(|error| parallel_error(error, model))?;
            Ok(partition.summary(&share.select(&model.checkpoint, &request)?))
        })
    }
}

/// Completes a request with what its ranks need.
pub(crate) fn assemble(model: &Inner, parallel: &Parallel, request: &mut Request) -> Result<()> {
    let device = request.device;
    if request.device_map.is_some() && parallel.one_rank().is_none() {
        let what =
            "ranks with devices of their own and a device map both say where tensors go; give one of them";
        return Err(Error::bad_request(what));
    }
    refuse_parts(model)?;
    let tp_size = parallel.shares.iter().map(|(ranks, _)| ranks.tp_size).max().unwrap_or(1);
    let assembly = parallel.with_partition(model, request.dequantize.as_ref(), tp_size, |partition| {
        let mut assembly = Assembly::default();
        for (ranks, own) in &parallel.shares {
            let share = partition.share(ranks, own.unwrap_or(device));
            let share = share.map_err(|error| parallel_error(error, model))?.assembly;
            let before = assembly.tensors.len() as u32; // At most 2^24 tensors for each of a few devices.
            let moved = |padding: Padding| Padding { tensor: padding.tensor + before, ..padding };
            assembly.padding.extend(share.padding.into_iter().map(moved));
            assembly.tensors.extend(share.tensors);
            // The same on every rank.
            (assembly.unfused, assembly.unused_rules) = (share.unfused, share.unused_rules);
        }
        Ok(assembly)
    })?;
    let mut devices: Vec<_> = parallel.shares.iter().map(|(_, own)| own.unwrap_or(device)).collect();
    devices.sort_unstable();
    if let Some(pair) = devices.windows(2).find(|pair| pair[0] == pair[1]) {
        let what = format!("two ranks of one load are for {}; each needs a device of its own", pair[0]);
        return Err(Error::bad_request(what));
    }
    request.assembly = Some(Arc::new(assembly));
    Ok(())
}

/// Refuses files that hold a rank's part.
fn refuse_parts(model: &Inner) -> Result<()> {
    for file in model.checkpoint.files() {
        if let Some(ranks) = file.header().metadata().get(RANKS) {
            let what =
                format!("is one rank's part already ({ranks}), and cannot be cut again; load it whole");
            return Err(Error::bad_request(what).in_file(model.folder.join(file.name())));
        }
    }
    Ok(())
}

impl Parallel {
    /// Returns the rank, if it is one and its device is the request's.
    pub(crate) fn one_rank(&self) -> Option<&Ranks> {
        match &*self.shares {
            [(ranks, None)] => Some(ranks),
            _ => None,
        }
    }

    /// Matches the rules with the model's tensors.
    fn with_partition<T>(
        &self,
        model: &Inner,
        dequantize: Option<&Dequantize>,
        tp_size: u32,
        act: impl FnOnce(&Partition<'_>) -> Result<T>,
    ) -> Result<T> {
        let config = config(model, self.rules.is_some())?;
        let failed = |error| parallel_error(error, model);
        let mut rules = match &self.rules {
            Some(rules) => rules.clone(),
            None => Rules::of(&config).map_err(failed)?,
        };
        if let Some(unmatched) = self.unmatched {
            rules = rules.unmatched(unmatched);
        }
        let quantization = model.quantization()?;
        if let Some(dequantize) = dequantize {
            dequantize.made(&model.checkpoint)?; // Each glob matches something of the whole model, if not of the rank.
        }
        let setup = Setup { quantization: Some(&quantization), dequantize, fuse: self.fuse.clone() };
        let partition = Partition::new(&model.checkpoint, &config, &rules, &setup).map_err(failed)?;
        if self.rules.is_some() && partition.is_unused() {
            let what = "no pattern of the rules names a tensor of the model; are they for another one?";
            return Err(Error::bad_request(what).in_file(&model.folder));
        }
        let indices = model.values_of(&partition.indices(tp_size))?;
        act(&partition.with_indices(&indices))
    }
}

/// Reads the model's `config.json`, without which only rules of the caller's own that count nothing work.
fn config(model: &Inner, may_be_missing: bool) -> Result<ModelConfig> {
    let path = model.folder.join("config.json");
    let is_missing = match &model.source {
        Source::Memory { .. } => true,
        Source::Files(_) => {
            matches!(fs::symlink_metadata(&path), Err(error) if error.kind() == io::ErrorKind::NotFound)
        }
    };
    if is_missing && may_be_missing {
        return Ok(ModelConfig::default());
    }
    if is_missing {
        let what = "there is no config.json to say which rules cut the model; give rules of your own";
        return Err(Error::bad_request(what).in_file(&model.folder));
    }
    let text = read_limited(&path, CONFIG_LEN_BYTES_MAX)?;
    ModelConfig::parse(&text).map_err(|error| Error::new(ErrorKind::Malformed, error).in_file(&path))
}

/// Tells what could not be fused, and which of the caller's rules are for no tensor.
pub(crate) fn fallbacks(plan: &Plan) -> impl Iterator<Item = Fallback> {
    let fallback = |Unfused { fusion, target, modules, why }: &Unfused| {
        Fallback::new(format!("{fusion} of {modules} modules stays unfused, first {target:?}"), why)
    };
    let unused =
        |rule: &String| Fallback::new(format!("rule {rule:?} is not used"), "no tensor of the model has it");
    plan.unfused().iter().map(fallback).chain(plan.unused_rules().iter().map(unused))
}

fn parallel_error(error: ParallelError, model: &Inner) -> Error {
    let kind = match &error {
        ParallelError::Config { .. } => ErrorKind::Malformed,
        ParallelError::UnknownArchitecture { .. } | ParallelError::Quantized(_) => ErrorKind::Unsupported,
        _ => ErrorKind::BadRequest,
    };
    Error::new(kind, error).in_file(&model.folder)
}

/// Whose part of a model a checkpoint is, among its metadata.
pub(crate) const RANKS: &str = "tensorhaul.ranks";

/// Configurations have a few kB; lists of excluded modules make some longer.
const CONFIG_LEN_BYTES_MAX: u64 = 16 << 20;
