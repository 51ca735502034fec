use std::collections::HashMap;

use ::safetensors::tensor::{Dtype, TensorView, serialize_to_file};

use super::*;
use crate::Kind;

fn write_shard(folder: &Path, name: &str, tensors: &[String]) {
    let data = [0_u8; 8];
    let views =
        tensors.iter().map(|tensor| (tensor, TensorView::new(Dtype::F16, vec![2, 2], &data).unwrap()));
    serialize_to_file(views, None, &folder.join(name)).unwrap();
}

fn write_index(folder: &Path, weight_map: &[(&str, &str)]) -> PathBuf {
    let map: HashMap<&str, &str> = weight_map.iter().copied().collect();
    let path = folder.join("model.safetensors.index.json");
    let index = serde_json::json!({"metadata": {"total_size": 32}, "weight_map": map});
    std::fs::write(&path, index.to_string()).unwrap();
    path
}

fn two_shards() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_shard(folder.path(), "one.safetensors", &["a".to_owned(), "b".to_owned()]);
    write_shard(folder.path(), "two.safetensors", &["c".to_owned()]);
    folder
}

fn assert_says(error: &Error, wanted: &[&str]) {
    assert_eq!(error.kind(), Kind::Model);
    let text = error.to_string();
    for part in wanted.iter().chain(&["index.json"]) {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
}

#[test]
fn every_shard_is_read() {
    let folder = two_shards();
    let (one, two) = ("one.safetensors", "two.safetensors");
    let path = write_index(folder.path(), &[("a", one), ("b", one), ("c", two)]);
    let names: Vec<String> = read(&path).unwrap().into_iter().map(|tensor| tensor.name).collect();
    assert_eq!(names, ["a", "b", "c"]);
    // Loaders take what a shard has, whether the index names it or not.
    let path = write_index(folder.path(), &[("a", one), ("c", two)]);
    assert_eq!(read(&path).unwrap().len(), 3);
}

#[test]
fn index_and_shards_must_say_the_same() {
    let folder = two_shards();
    let (one, two) = ("one.safetensors", "two.safetensors");
    let path = write_index(folder.path(), &[("a", one), ("b", two), ("c", two)]);
    assert_says(&read(&path).unwrap_err(), &["\"b\"", "\"two.safetensors\"", "is in one.safetensors"]);
    let path = write_index(folder.path(), &[("a", one), ("c", two), ("d", two)]);
    assert_says(&read(&path).unwrap_err(), &["\"d\"", "no shard has that tensor"]);
    let path = write_index(folder.path(), &[("a", one), ("c", "three.safetensors")]);
    let error = read(&path).unwrap_err();
    assert!(
        matches!(&error, Error::MissingShard { shard, tensor, .. } if shard == "three.safetensors" && tensor == "c")
    );
    write_shard(folder.path(), two, &["c".to_owned(), "a".to_owned()]);
    let path = write_index(folder.path(), &[("b", one), ("c", two)]);
    let text = read(&path).unwrap_err().to_string();
    assert!(
        text.contains("two.safetensors") && text.contains("\"a\" is in one.safetensors as well"),
        "{text}"
    );
}

#[test]
fn no_shard_lies_elsewhere() {
    for shard in [
        "../two.safetensors",
        "/etc/two.safetensors",
        "sub/two.safetensors",
        "..\\two.safetensors",
        "C:two.safetensors",
        "..",
        "",
        ".safetensors",
        "two\0.safetensors",
        "pytorch_model.bin",
        &format!("{}.safetensors", "x".repeat(300)),
    ] {
        let folder = two_shards();
        let path = write_index(folder.path(), &[("a", shard)]);
        let quoted = format!("{:?}", shard.get(..50).unwrap_or(shard));
        assert_says(&read(&path).unwrap_err(), &["names the shard", quoted.trim_matches('"')]);
    }
}

#[test]
fn what_is_no_index_is_refused() {
    let cases: &[(&str, &str)] = &[
        ("", "EOF"),
        ("[]", "an object with a weight_map"),
        ("{}", "no weight_map"),
        (r#"{"weight_map": {}}"#, "names no tensor"),
        (r#"{"weight_map": "x"}"#, "got the string \"x\""),
        (r#"{"weight_map": {"a": 1}}"#, "a string"),
        (r#"{"weight_map": {"a": "b.safetensors"}, "weight_map": {}}"#, "two entries weight_map"),
        (r#"{"weight_map": {"a": "b.safetensors"}} x"#, "trailing"),
        (r#"{"metadata": [[[[[[[[]]]]]]]]}"#, "deeper than 8"),
    ];
    for (text, wanted) in cases {
        let error = parse(text.as_bytes(), Path::new("m.index.json"), |_, _| Ok(())).unwrap_err();
        assert_says(&error, &[wanted, "download it again"]);
    }
    let long = format!(r#"{{"weight_map": {{"\u0061{}": 1}}}}"#, "x".repeat(2 << 20));
    let error = parse(long.as_bytes(), Path::new("m.index.json"), |_, _| Ok(())).unwrap_err();
    assert_says(&error, &["longer than names are"]);
}

/// As many tensors and shards as the largest checkpoints have. Anything quadratic would take minutes.
#[test]
fn ninety_thousand_tensors_in_163_shards() {
    let folder = tempfile::tempdir().unwrap();
    let shards: Vec<(String, Vec<String>)> = (0..163)
        .map(|shard| {
            let tensors =
                (0..553).map(|tensor| format!("model.layers.{shard}.mlp.experts.{tensor}.up_proj.weight"));
            (format!("model-{:05}-of-00163.safetensors", shard + 1), tensors.collect())
        })
        .collect();
    let mut weight_map = Vec::new();
    for (name, tensors) in &shards {
        write_shard(folder.path(), name, tensors);
        weight_map.extend(tensors.iter().map(|tensor| (tensor.as_str(), name.as_str())));
    }
    let path = write_index(folder.path(), &weight_map);
    let start = std::time::Instant::now();
    assert_eq!(read(&path).unwrap().len(), 163 * 553);
    let taken = start.elapsed();
    assert!(taken.as_secs() < 20, "{taken:?}");
}
