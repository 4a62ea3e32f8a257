//! Ranks: what each flag asks for, and what is said of what cannot be: one line with the numbers, and the code that says whose move it is.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{read_by_reference, tensorhaul, tiny_llama, write_model};

/// Plans for ranks of the checkpoint in the repository; what it has besides a Llama's tensors, every rank has whole.
fn plan(args: &[&str]) -> crate::Ran {
    tensorhaul([&["plan", tiny_llama(), "--unmatched", "replicate"], args].concat())
}

fn summary(args: &[&str]) -> Value {
    plan(&[args, &["--by-rule", "--json"]].concat()).json()
}

/// A file of rules in a folder of the test's own.
fn rules(folder: &Path, text: &str) -> String {
    let path = folder.join("rules.json");
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn each_flag_says_which_part() {
    let bytes = |args: &[&str]| summary(args)["bytes"].as_u64().unwrap();
    let whole = bytes(&[]);
    assert!(bytes(&["--tp-size", "4", "--tp-rank", "3"]) < whole / 3);
    let stages = ["0", "1"].map(|stage| bytes(&["--pp-size", "2", "--pp-stage", stage]));
    assert_eq!(stages.iter().sum::<u64>(), whole);
    assert_eq!(bytes(&["--layers", "0..1"]), stages[0]);
    assert_eq!(bytes(&["--layers", "0..2"]), whole);
    assert_eq!(bytes(&["--tp-size", "1"]), whole, "the only one needs no number");
    let fused = summary(&["--fuse"]);
    let names = |summary: &Value| -> Vec<String> {
        let kinds = summary["kinds"].as_array().unwrap().iter();
        kinds.map(|kind| kind["names"].as_str().unwrap().to_owned()).collect()
    };
    assert!(names(&fused).contains(&"model.layers.0-1.self_attn.qkv_proj.weight".to_owned()));
    assert_eq!(fused["unfused"], serde_json::json!([]));
    let only = summary(&["--fuse=gate_up"]);
    assert!(names(&only).contains(&"model.layers.0-1.self_attn.q_proj.weight".to_owned()));
    assert!(names(&only).contains(&"model.layers.0-1.mlp.gate_up_proj.weight".to_owned()));
}

#[test]
fn ranks_that_are_not_there_are_refused_with_the_numbers() {
    for (args, line) in [
        (
            &["--tp-size", "4", "--tp-rank", "4"][..],
            "tensor-parallel rank 4 is outside its group of 4 (0 to 3)",
        ),
        (&["--pp-size", "2", "--pp-stage", "2"], "pipeline stage 2 is outside its group of 2 (0 to 1)"),
        (&["--ep-size", "2", "--ep-rank", "7"], "expert-parallel rank 7 is outside its group of 2 (0 to 1)"),
        (&["--tp-size", "4"], "--tp-size 4 needs --tp-rank: which of them, from 0 to 3"),
        (&["--pp-size", "2"], "--pp-size 2 needs --pp-stage: which of them, from 0 to 1"),
        (&["--ep-size", "8"], "--ep-size 8 needs --ep-rank: which of them, from 0 to 7"),
    ] {
        let said = plan(args).error(2);
        assert!(said.ends_with(line), "{args:?}: {said}");
    }
    for (args, word) in [
        (&["--tp-size", "0", "--tp-rank", "0"][..], "'0' for '--tp-size <RANKS>'"),
        (&["--pp-size", "0", "--pp-stage", "0"], "'0' for '--pp-size <STAGES>'"),
        (&["--ep-size", "0", "--ep-rank", "0"], "'0' for '--ep-size <RANKS>'"),
        (&["--tp-rank", "0"], "--tp-size <RANKS>"),
        (&["--pp-stage", "0"], "--pp-size <STAGES>"),
        (&["--ep-rank", "0"], "--ep-size <RANKS>"),
        (&["--tp-size", "2", "--tp-rank", "-1"], "'-1'"),
        (&["--layers", "3"], "0..16"),
        (&["--layers", "0..1", "--pp-size", "2"], "'--layers <FIRST..END>'"),
        (&["--all-ranks", "--tp-size", "2", "--tp-rank", "0"], "'--tp-rank <RANK>'"),
        (&["--all-ranks", "--by-rule"], "'--by-rule'"),
    ] {
        let said = plan(args).error(2);
        assert!(said.contains(word) && said.ends_with("see --help"), "{args:?}: {said}");
    }
    let said = tensorhaul(["plan", tiny_llama(), "--unmatched", "guess"]).error(2);
    assert!(said.contains("refuse, replicate"), "{said}");
}

#[test]
fn sizes_that_do_not_fit_the_model_name_those_that_do() {
    for (args, line) in [
        (
            &["--tp-size", "3", "--tp-rank", "0"][..],
            "tensor \"model.layers.0.mlp.gate_proj.weight\": 3 ranks cannot share 176 rows evenly; 1, 2, 4, 8 can",
        ),
        (&["--pp-size", "3", "--pp-stage", "0"], "3 pipeline stages need as many layers, the model has 2"),
        (&["--layers", "1..5"], "layers 1..5 are not all among the model's 2 (0 to 1)"),
        (&["--layers", "1..1"], "layers 1..1 are none; give the first and the one behind the last: 0..2"),
        (
            &["--ep-size", "2", "--ep-rank", "0"],
            "LlamaForCausalLM has no experts for 2 ranks to share; leave expert parallelism out",
        ),
    ] {
        for command in ["plan", "load"] {
            let all = [&[command, tiny_llama(), "--unmatched", "replicate"], args].concat();
            let said = tensorhaul(all).error(2);
            assert!(said.ends_with(line), "{command} {args:?}: {said}");
        }
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let all =
            [&["convert", tiny_llama(), out.to_str().unwrap(), "--unmatched", "replicate"], args].concat();
        let said = tensorhaul(all).error(2);
        assert!(said.ends_with(line), "convert {args:?}: {said}");
        assert!(!out.exists());
    }
}

#[test]
fn rules_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let with = |text: &str, more: &[&str]| {
        let path = rules(folder.path(), text);
        tensorhaul([&["plan", tiny_llama(), "--rules", &path], more].concat())
    };
    let said = tensorhaul(["plan", tiny_llama(), "--tp-size", "2", "--tp-rank", "0"]).error(2);
    assert!(
        said.contains("no rule names ") && said.ends_with("--unmatched replicate), or add rules"),
        "{said}"
    );
    let said = with(r#"{"rules":{"**":"replicated","model.norm":"row","model.norm.weight":"column"}}"#, &[])
        .error(2);
    assert!(
        said.ends_with("tensor \"model.norm.weight\": rules \"model.norm\" and \"model.norm.weight\" name it alike, and differ"),
        "{said}"
    );
    let said = with(r#"{"rules":{"other.**":"replicated"}}"#, &["--unmatched", "replicate"]).error(2);
    assert!(said.contains("no pattern of the rules names a tensor of the model"), "{said}");
    let said = with(r#"{"layers.*.mlp.up_proj":"sideways"}"#, &[]).error(1);
    assert!(said.contains("rules.json: ") && said.contains("\"sideways\" is none of colwise, "), "{said}");
    let said = with("{", &[]).error(1);
    assert!(said.contains("rules.json: rules given: "), "{said}");
    let said = tensorhaul(["plan", tiny_llama(), "--rules", "/no/such/rules"]).error(1);
    assert!(said.contains("/no/such/rules: "), "{said}");
}

#[test]
fn what_cannot_be_fused_is_told_or_refused_where_it_was_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = rules(
        folder.path(),
        r#"{"extends":"LlamaForCausalLM","rules":{},"fuse":[
            {"name":"odd","target":"layers.*.mlp.odd","rows":["layers.*.mlp.up_proj","layers.*.mlp.down_proj"]},
            {"name":"gone","target":"layers.*.mlp.gone","rows":["layers.*.mlp.up_proj2"]}]}"#,
    );
    let with = |args: &[&str]| plan(&[&["--rules", &path], args].concat());
    let why = "\"model.layers.0.mlp.down_proj.weight\" stays quantized, with scales of its own; dequantized it would fit";
    let shown = with(&["--fuse"]).ok();
    let told = format!("not fused      odd of 2 modules, such as \"model.layers.0.mlp.odd.weight\": {why}");
    assert!(shown.lines().any(|line| line == told), "{shown}");
    assert_eq!(with(&["--fuse", "--json"]).json()["unfused"][0]["modules"], 2);
    let shown = with(&["--fuse", "--by-rule"]).ok();
    assert!(shown.contains("  not fused: odd of 2 modules"), "{shown}");
    let shown = with(&["--fuse", "--all-ranks", "--tp-size", "2"]).ok();
    assert!(shown.contains("not fused: odd of 2 modules"), "{shown}");
    let loaded =
        tensorhaul(["load", tiny_llama(), "--unmatched", "replicate", "--rules", &path, "--fuse", "--json"]);
    let fallbacks = loaded.json()["fallbacks"].clone();
    assert!(fallbacks.to_string().contains("odd of 2 modules stays unfused"), "{fallbacks}");

    let said = with(&["--fuse=odd"]).error(2);
    assert!(
        said.ends_with(&format!(
            "fused tensor \"model.layers.0.mlp.odd.weight\": {why}; leave \"odd\" out, or fuse what can be (--fuse alone)"
        )),
        "{said}"
    );
    let said = with(&["--fuse=gone"]).error(2);
    assert!(said.ends_with("no tensor of the model goes into a fused \"gone\"; leave it out"), "{said}");
    let said = with(&["--fuse=kv"]).error(2);
    assert!(said.contains("the rules fuse no \"kv\"; they fuse "), "{said}");
}

#[test]
fn names_to_fuse_that_stand_behind_a_space_are_told_where_to_stand() {
    let behind = |args: &[&str]| tensorhaul(args).error(2);
    for args in
        [["plan", tiny_llama(), "--fuse", "qkv,gate_up"], ["load", "--fuse", "qkv,gate_up", tiny_llama()]]
    {
        let said = behind(&args);
        assert!(
            said.contains("names to fuse stand behind an equals sign: --fuse=qkv,gate_up; see"),
            "{said}"
        );
    }
    for args in [["plan", "--fuse", tiny_llama(), "--bogus"], ["plan", "--fuse", "model", "--bogus"]] {
        let said = behind(&args);
        assert!(said.contains("'--bogus'") && !said.contains("equals"), "{said}");
    }
}

#[test]
fn rules_of_the_callers_own_that_no_tensor_has_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let text =
        r#"{"extends":"LlamaForCausalLM","rules":{"layers.*.mlp.upproj":"column","lm_head":"replicated"}}"#;
    let path = rules(folder.path(), text);
    let told = "not used: rule \"layers.*.mlp.upproj\", which no tensor has";
    let with = |args: &[&str]| plan(&[&["--rules", &path], args].concat());
    let of_rank = ["--tp-size", "2", "--tp-rank", "1"];
    let is_told = |text: &str, line: &str| {
        let lines: Vec<&str> =
            text.lines().map(str::trim).filter(|line| line.contains("which no tensor")).collect();
        assert_eq!(lines, [line], "{text}");
    };
    is_told(&with(&of_rank).ok(), &told.replace("not used:", "not used      "));
    is_told(&with(&[&of_rank[..], &["--by-rule"]].concat()).ok(), told);
    is_told(&with(&["--tp-size", "2", "--all-ranks"]).ok(), told);
    is_told(&with(&["--tp-size", "2", "--share", "node"]).ok(), told);
    let patterns = serde_json::json!(["layers.*.mlp.upproj"]);
    assert_eq!(with(&[&of_rank[..], &["--json"]].concat()).json()["unused_rules"], patterns);
    let all: Value = serde_json::from_str(&with(&["--tp-size", "2", "--all-ranks", "--json"]).ok()).unwrap();
    assert_eq!(all[1]["unused_rules"], patterns);

    let more = [&["--unmatched", "replicate", "--rules", &path][..], &of_rank].concat();
    let loaded = tensorhaul([&["load", tiny_llama(), "--json"][..], &more].concat()).json();
    let fallbacks = loaded["fallbacks"].as_array().unwrap();
    let unused =
        fallbacks.iter().find(|fallback| fallback["what"] == "rule \"layers.*.mlp.upproj\" is not used");
    assert_eq!(unused.unwrap()["why"], "no tensor of the model has it");
    let out = folder.path().join("out");
    let converted = tensorhaul([&["convert", tiny_llama(), out.to_str().unwrap()][..], &more].concat()).ok();
    is_told(&converted, "unused    rule \"layers.*.mlp.upproj\", which no tensor has");

    // The library's own tables have lines for what other models of a family have.
    assert!(!plan(&of_rank).ok().contains("not used"));
}

#[test]
fn all_ranks_are_those_of_the_group() {
    // Lines between the heading and the sum.
    let ranks = |ran: crate::Ran| -> Vec<String> {
        let text = ran.ok();
        let lines = text.lines().skip(1).take_while(|line| !line.starts_with("all"));
        lines.map(|line| line.split("  ").next().unwrap().to_owned()).collect()
    };
    assert_eq!(
        ranks(plan(&["--all-ranks", "--tp-size", "2", "--layers", "1..2"])),
        ["tp 0/2, layers 1..2, ep 0/1", "tp 1/2, layers 1..2, ep 0/1"]
    );
    assert_eq!(ranks(plan(&["--all-ranks", "--tp-size", "2", "--pp-size", "2"])).len(), 4);

    let folder = tempfile::tempdir().unwrap();
    let model = mixture(folder.path());
    let of = |args: &[&str]| tensorhaul([&["plan", model.to_str().unwrap(), "--all-ranks"], args].concat());
    assert_eq!(ranks(of(&["--tp-size", "2", "--ep-size", "2"])).len(), 4);
    assert_eq!(
        ranks(of(&["--tp-size", "2", "--ep-size", "4", "--whole-experts"])),
        ["0/2, pp 0/1, ep 0/4", "1/2, pp 0/1, ep 1/4", "0/2, pp 0/1, ep 2/4", "1/2, pp 0/1, ep 3/4"]
            .map(|place| format!("tp {place}, whole experts"))
    );
    let said = of(&["--tp-size", "2", "--ep-size", "3", "--whole-experts"]).error(2);
    assert!(
        said.ends_with("3 that share experts and 2 that share matrices must be a multiple of one another"),
        "{said}"
    );
    let said = of(&["--tp-size", "1", "--ep-size", "3"]).error(2);
    assert!(said.ends_with("3 ranks cannot share 4 experts evenly; 1, 2, 4 can"), "{said}");
}

/// A Mixtral of one layer and four experts: headers are all that plans look at.
fn mixture(folder: &Path) -> PathBuf {
    let model = folder.join("mixture");
    fs::create_dir(&model).unwrap();
    let config = r#"{"architectures":["MixtralForCausalLM"],"num_hidden_layers":1,"num_attention_heads":2,"num_local_experts":4}"#;
    fs::write(model.join("config.json"), config).unwrap();
    let experts = (0..4).flat_map(|expert| ["w1", "w2", "w3"].map(|name| (expert, name)));
    let entry = |(place, (expert, name)): (usize, (u32, &str))| {
        let name = format!("model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight");
        format!(
            r#""{name}":{{"dtype":"BF16","shape":[4,4],"data_offsets":[{},{}]}}"#,
            32 * place,
            32 * (place + 1)
        )
    };
    let entries: Vec<String> = experts.enumerate().map(entry).collect();
    write_model(&model.join("model.safetensors"), &entries.join(","), 12 * 32);
    model
}

#[test]
fn by_rule_shows_what_is_selected_as_objects() {
    let shown = summary(&["--tp-size", "2", "--tp-rank", "1", "--tensor", "*.1.self_attn.k_proj.weight"]);
    assert_eq!((&shown["tensors"], &shown["bytes"]), (&1.into(), &2048.into()));
    assert_eq!(shown["ranks"]["layers"]["stage"]["size"], 1);
    let kind = &shown["kinds"][0];
    assert_eq!(kind["names"], "model.layers.1.self_attn.k_proj.weight");
    assert_eq!((&kind["rule"], &kind["dtype"]), (&"column by kv heads".into(), &"BF16".into()));
    assert_eq!(
        (&kind["shape"], &kind["from"][0]["shape"]),
        (&serde_json::json!([16, 64]), &serde_json::json!([32, 64]))
    );
    assert_eq!(kind["from"][0]["slice"]["ranges"][0]["start"], 16);
    let ranged = summary(&["--layers", "0..1"]);
    assert_eq!(ranged["ranks"]["layers"]["range"]["end"], 1);
    let said = plan(&["--by-rule", "--tensor", "no.such.*"]).error(2);
    assert!(said.contains("no.such.*"), "{said}");
}

#[test]
fn copies_for_ranks_hold_the_ranks_parts_and_are_not_cut_again() {
    let folder = tempfile::tempdir().unwrap();
    let whole = read_by_reference(tiny_llama().as_ref());
    let name = "model.layers.0.self_attn.v_proj.weight";
    let mut rows: Vec<u8> = Vec::new();
    for rank in ["0", "1"] {
        let out = folder.path().join(rank);
        let args = ["--unmatched", "replicate", "--tp-size", "2", "--tp-rank", rank];
        tensorhaul([&["convert", tiny_llama(), out.to_str().unwrap()], &args[..]].concat()).ok();
        let copy = read_by_reference(&out);
        assert_eq!(copy.len(), whole.len());
        rows.extend(&copy[name].2);
        let said = tensorhaul([&["load", out.to_str().unwrap()], &args[..]].concat()).error(2);
        assert!(
            said.contains(&format!("is one rank's part already (tp {rank}/2, pp 0/1, ep 0/1)")),
            "{said}"
        );
        tensorhaul(["load", out.to_str().unwrap()]).ok();
    }
    assert_eq!(rows, whole[name].2);
}
