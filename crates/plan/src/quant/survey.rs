//! The two steps of recognition: what must be read, and what it all means.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use super::config::{Config, Method};
use super::dispatch::{self, Signature};
use super::families::bitsandbytes::STATE;
use super::families::comfy::Layers;
use super::families::gptq::{self, Samples};
use super::families::hqq;
use super::families::plain;
use super::families::torchao::{self, Entry};
use super::quantization::{Part, Quantization, Refusal, pass};
use super::scene::{Scene, contradiction, missing, split, stray_scale, unsupported};
use super::values::{NEED_LEN_BYTES_MAX, Need, Values};
use super::{Configs, Family, Group, QuantError, Recipe, Role};
use crate::checkpoint::{Checkpoint, TensorId, TensorRef};
use crate::dtype::Dtype;

/// A first look at a checkpoint: what may be quantized, and which bytes would tell.
#[derive(Debug)]
pub struct Survey {
    config: Config,
    candidates: Vec<Candidate>,
    /// Whether there are integers that codes may be packed into.
    has_integers: bool,
    needs: Vec<Need>,
    samples: Samples,
    comfy: Layers,
    torchao: Vec<Entry>,
    refused: Vec<Refusal>,
}

/// A tensor that may be quantized, or describes one that is.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    signature: Signature,
    anchor: TensorId,
}

impl Survey {
    /// Looks at names, dtypes and metadata. A checkpoint without anything quantized costs a glance at each name.
    ///
    /// # Errors
    /// What is wrong with a configuration as a whole: [`QuantError::ConfigTooLong`], [`QuantError::ConfigJson`],
    /// [`QuantError::ConfigValue`]. The checkpoint can still be loaded as stored.
    pub fn new(checkpoint: &Checkpoint, configs: &Configs) -> Result<Survey, QuantError> {
        let config = Config::read(configs)?;
        let mut survey = Survey {
            config,
            candidates: Vec::new(),
            has_integers: false,
            needs: Vec::new(),
            samples: Samples::default(),
            comfy: Layers::default(),
            torchao: Vec::new(),
            refused: Vec::new(),
        };
        if let Method::Foreign(family) = &survey.config.method {
            let what = format!("the layout that {} names", survey.config.source);
            let error = QuantError::Unsupported { family: family.clone(), tensor: None, what };
            survey.refused.push(Refusal { tensor: None, error });
            return Ok(survey);
        }
        let described = survey.read_metadata(checkpoint)?;
        for tensor in checkpoint.tensors() {
            let named = || dispatch::signature(tensor.info.name, tensor.info.dtype);
            let described = described.get(&tensor.id).map(|place| Signature::Torchao(*place));
            let Some(signature) = described.or_else(named) else {
                survey.has_integers |= may_be_codes(&tensor);
                continue;
            };
            survey.add(checkpoint, signature, &tensor);
        }
        survey.needs.sort_unstable();
        survey.needs.dedup();
        Ok(survey)
    }

    /// Returns the bytes that recognition wants to see, in the order of the files and each tensor once. Writers put small tensors of
    /// one dtype side by side, so that many of them are one read.
    pub fn needs(&self) -> &[Need] {
        &self.needs
    }

    /// Joins tensors to groups.
    ///
    /// Whatever cannot be dequantized is [refused](Quantization::refused), as data. A group's recipe folds a
    /// [`pre_quant_scale`](Role::Fold) in where there is one; whoever wants the weight without it, as runtimes that multiply
    /// activations do, sets `recipe.fold` to `None`.
    ///
    /// # Panics
    /// When the checkpoint is not the one that was surveyed.
    pub fn recognize(&self, checkpoint: &Checkpoint, values: &Values) -> Quantization {
        let mut quantization = Quantization {
            refused: self.refused.clone(),
            warnings: self.config.warnings.clone(),
            ..Quantization::default()
        };
        if self.candidates.is_empty() && !self.has_integers {
            return quantization;
        }
        let mut comfy = self.comfy.clone();
        for candidate in &self.candidates {
            if candidate.signature == Signature::ComfyLayer {
                let name = checkpoint.tensor(candidate.anchor).info.name;
                comfy.add_tensor(name, candidate.anchor, values);
            }
        }
        let (mut groups, mut recipes) = (Vec::with_capacity(self.candidates.len()), Recipes::default());
        let scene = Scene { checkpoint, config: &self.config, values, samples: &self.samples, comfy: &comfy };
        for candidate in &self.candidates {
            let anchor = checkpoint.tensor(candidate.anchor);
            match recognize(&scene, candidate.signature, &anchor, &self.torchao) {
                Ok(Some(mut group)) => {
                    recipes.share(&mut group.recipe);
                    groups.push(group);
                }
                Ok(None) => {}
                Err(error) => quantization.refused.push(Refusal { tensor: Some(anchor.id), error }),
            }
        }
        quantization.warnings.extend(gptq::warnings(&self.config, &self.samples, values, checkpoint));
        finish(checkpoint, groups, &mut quantization);
        quantization
    }

    /// Reads what headers say, and returns which tensors torchao's entries begin with.
    fn read_metadata(&mut self, checkpoint: &Checkpoint) -> Result<HashMap<TensorId, u32>, QuantError> {
        let mut described = HashMap::new();
        for file in checkpoint.files() {
            let metadata = file.header().metadata();
            self.comfy.add_metadata(file.name(), metadata)?;
            for entry in torchao::entries(file.name(), metadata)? {
                match entry.payload(checkpoint) {
                    Some(payload) => {
                        described.insert(payload.id, self.torchao.len() as u32); // Fewer than tensors.
                        self.torchao.push(entry);
                    }
                    None => {
                        self.refused.push(Refusal { tensor: None, error: torchao::missing_payload(&entry) });
                    }
                }
            }
        }
        Ok(described)
    }

    fn add(&mut self, checkpoint: &Checkpoint, signature: Signature, tensor: &TensorRef<'_>) {
        let (base, _) = split(tensor.info.name);
        let mut whole = |tensor: TensorRef<'_>| {
            let len_bytes = tensor.info.len_bytes();
            if len_bytes <= NEED_LEN_BYTES_MAX {
                self.needs.push(Need { tensor: tensor.id, len_bytes });
            }
        };
        let find = |leaf: &str| checkpoint.find(&[base, leaf].concat());
        match signature {
            Signature::Qweight => self.samples.add(checkpoint, &self.config, tensor, &mut self.needs),
            Signature::WeightPacked => _ = find("weight_shape").map(whole),
            Signature::BnbState | Signature::ComfyLayer => whole(*tensor),
            Signature::Bytes => _ = find("weight_format").map(whole),
            Signature::Hqq => {
                hqq::READ.iter().chain(&["packing"]).filter_map(|leaf| find(leaf)).for_each(whole)
            }
            _ => {}
        }
        self.candidates.push(Candidate { signature, anchor: tensor.id });
    }
}

/// The recipes of the last groups, the latest first: a layer has a few, and every layer the same.
#[derive(Default)]
struct Recipes(VecDeque<Arc<Recipe>>);

impl Recipes {
    /// Makes a recipe one with an equal one.
    fn share(&mut self, recipe: &mut Arc<Recipe>) {
        let place = self.0.iter().position(|known| known == recipe);
        let known = place.and_then(|place| self.0.remove(place));
        *recipe = known.unwrap_or_else(|| Arc::clone(recipe));
        self.0.truncate(RECIPES_MAX - 1);
        self.0.push_front(Arc::clone(recipe));
    }
}

/// Joins the tensors of a candidate, unless its sizes would overflow.
fn recognize(
    scene: &Scene<'_>,
    signature: Signature,
    anchor: &TensorRef<'_>,
    entries: &[Entry],
) -> Result<Option<Group>, QuantError> {
    let len_bytes = anchor.info.len_bytes();
    match signature {
        // It describes a tensor, and must say something.
        Signature::BnbState => {}
        // Nothing to scale: a cast of no numbers.
        Signature::Float8 | Signature::SubByte if len_bytes == 0 => {
            return plain::recognize(anchor).map(Some);
        }
        // Placeholders without data are no quantized tensors.
        _ if len_bytes == 0 => return Ok(None),
        _ => {}
    }
    if len_bytes > PAYLOAD_LEN_BYTES_MAX {
        let expected = format!("at most {PAYLOAD_LEN_BYTES_MAX} bytes");
        return Err(super::scene::wrong_shape(anchor, expected));
    }
    dispatch::recognize(scene, signature, anchor, entries)
}

/// Puts groups in order, says what each tensor is, and refuses groups that claim what another has.
fn finish(checkpoint: &Checkpoint, mut groups: Vec<Group>, quantization: &mut Quantization) {
    let Quantization { refused, parts, .. } = quantization;
    groups.sort_by_key(payload);
    let mut is_scaled = vec![false; checkpoint.len()];
    for (_, member) in groups.iter().filter(|group| group.members.len() > 1).flat_map(|group| &group.members)
    {
        is_scaled[member.0 as usize] = true;
    }
    let stray = |tensor: &TensorRef<'_>| stray_scale(checkpoint, tensor, |id| is_scaled[id.0 as usize]);
    *parts = vec![Part::Plain; checkpoint.len()];
    // Of results under new names; the others keep a stored tensor's, which are unique.
    let mut names = HashSet::new();
    let mut place = 0;
    groups.retain(|group| {
        let id = payload(group);
        let stored = checkpoint.tensor(id);
        let taken = group.members.iter().find(|(_, member)| parts[member.0 as usize] != Part::Plain);
        let is_renamed = group.name != stored.info.name;
        let error = if group.family == Family::Plain
            && let Some(scale) = stray(&stored)
        {
            Some(strange_scale(&stored, &scale))
        } else if let Some((_, member)) = taken {
            let found =
                format!("{:?} belongs to another quantized tensor too", checkpoint.tensor(*member).info.name);
            Some(contradiction(&stored, "every stored tensor belongs to one", found))
        } else if is_renamed && checkpoint.find(&group.name).is_some() {
            let found = format!("{:?} is stored too", group.name);
            Some(contradiction(&stored, "it is stored quantized", found))
        } else if is_renamed && !names.insert(group.name.clone()) {
            Some(contradiction(
                &stored,
                "every result has a name of its own",
                format!("{:?} has two", group.name),
            ))
        } else {
            too_short(checkpoint, group)
        };
        if let Some(error) = error {
            refused.push(Refusal { tensor: Some(id), error });
            return false;
        }
        for (_, member) in &group.members {
            parts[member.0 as usize] = Part::Member(place);
        }
        place += 1; // Fewer than tensors.
        true
    });
    let mut known: HashSet<_> = refused.iter().filter_map(|refusal| refusal.tensor).collect();
    // What describes a tensor stands for it.
    let described = |id: &TensorId| checkpoint.find(checkpoint.tensor(*id).info.name.split_once(STATE)?.0);
    let described: Vec<_> = known.iter().filter_map(described).map(|tensor| tensor.id).collect();
    known.extend(described);
    for tensor in checkpoint.tensors() {
        let part = &mut parts[tensor.id.0 as usize];
        if *part != Part::Plain || known.contains(&tensor.id) {
            continue;
        }
        look_at_rest(checkpoint, &tensor, part, refused);
        if may_be_codes(&tensor)
            && let Some(scale) = stray(&tensor)
        {
            refused.push(Refusal { tensor: Some(tensor.id), error: strange_scale(&tensor, &scale) });
        }
    }
    refused.sort_by_key(|refusal| refusal.tensor);
    quantization.groups = groups.into();
}

/// Tells integers that codes may be packed into from indices and masks.
fn may_be_codes(tensor: &TensorRef<'_>) -> bool {
    use Dtype::{I8, I16, I32, U8, U16, U32};
    let (_, leaf) = split(tensor.info.name);
    let is_auxiliary = leaf.contains("zero") || leaf.contains("scale") || leaf == "g_idx";
    matches!(tensor.info.dtype, U8 | I8 | U16 | I16 | U32 | I32)
        && tensor.info.len_bytes() > 0
        && !is_auxiliary
}

/// Codes that nothing here reads must not pass for numbers.
fn strange_scale(tensor: &TensorRef<'_>, scale: &TensorRef<'_>) -> QuantError {
    unsupported("scaled codes", tensor, format!("a scale called {:?}", scale.info.name))
}

/// Finds a tensor with fewer bytes than the recipe reads of it. Families have checked every shape; this holds also where one of
/// them has a mistake, because kernels do not look where they read.
fn too_short(checkpoint: &Checkpoint, group: &Group) -> Option<QuantError> {
    let stored = checkpoint.tensor(payload(group));
    Role::READ.into_iter().find_map(|role| {
        let least = group.recipe.source_len_bytes(role)?;
        let member = group.members.iter().find(|(of, _)| *of == role);
        let have = member.map_or(0, |(_, id)| checkpoint.tensor(*id).info.len_bytes());
        let found = || format!("its {} has {have} bytes, {least} are read", role.name());
        (have < least).then(|| contradiction(&stored, "its shape and its parts belong together", found()))
    })
}

/// Says what a tensor is that belongs to no group, and refuses scales whose codes are missing.
fn look_at_rest(
    checkpoint: &Checkpoint,
    tensor: &TensorRef<'_>,
    part: &mut Part,
    refused: &mut Vec<Refusal>,
) {
    let (base, leaf) = split(tensor.info.name);
    if let Some(pass) = pass(leaf) {
        *part = Part::PassedThrough(pass);
        return;
    }
    let payloads: &[&str] = match leaf {
        "qzeros" => &["qweight"],
        "weight_shape" => &["weight_packed"],
        "weight_scale" | "weight_scale_inv" | "weight_scale_2" | "scale_weight" => {
            &["weight", "weight_packed"]
        }
        _ => return,
    };
    if payloads.iter().all(|leaf| checkpoint.find(&[base, leaf].concat()).is_none()) {
        let error = missing(tensor, &[base, payloads[0]].concat(), "codes");
        refused.push(Refusal { tensor: Some(tensor.id), error });
    }
}

fn payload(group: &Group) -> TensorId {
    let payload = group.members.iter().find(|(role, _)| *role == Role::Payload);
    payload.expect("every family makes its payload a member").1
}

/// How many recipes are compared with the next.
const RECIPES_MAX: usize = 16;

/// The longest payload: beyond every file system, and small enough that eight times its bits can be counted.
const PAYLOAD_LEN_BYTES_MAX: u64 = 1 << 56;
