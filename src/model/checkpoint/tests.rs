use std::fs;

use ::safetensors::tensor::{Dtype, TensorView, serialize_to_file};

use super::*;
use crate::Kind;

/// A folder with these files: safetensors files hold one tensor named after the file, GGUF files nothing.
fn folder(names: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in names {
        let path = folder.path().join(name);
        let extension = path.extension().and_then(OsStr::to_str);
        if extension == Some("safetensors") {
            let data = [0; 4];
            let view = TensorView::new(Dtype::F32, vec![1], &data).unwrap();
            serialize_to_file([(name, view)], None, &path).unwrap();
        } else if extension == Some("gguf") {
            fs::write(path, [b"GGUF\x03\0\0\0".to_vec(), vec![0; 16]].concat()).unwrap();
        } else {
            fs::write(path, r#"{"model_type": "llama"}"#).unwrap();
        }
    }
    folder
}

fn index(folder: &tempfile::TempDir, shards: &[&str]) {
    let map: serde_json::Map<_, _> =
        shards.iter().map(|shard| ((*shard).to_owned(), Value::from(*shard))).collect();
    let text = serde_json::json!({ "weight_map": map }).to_string();
    fs::write(folder.path().join("model.safetensors.index.json"), text).unwrap();
}

fn tensors(checkpoint: &Checkpoint) -> Vec<&str> {
    checkpoint.tensors.iter().flatten().map(|tensor| tensor.name.as_str()).collect()
}

fn refusal(path: &Path) -> String {
    let error = find(path).unwrap_err();
    assert_eq!(error.kind(), Kind::Model, "{error}");
    error.to_string()
}

#[test]
fn a_folder_is_read_in_the_order_of_preference() {
    let all = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let others = ["adapter_model.safetensors", "consolidated.00.safetensors", "consolidated.safetensors"];
    let mut names = vec!["config.json", "model.safetensors", "other.safetensors", "x.gguf", "README.md"];
    names.extend(all);
    names.extend(others);
    let folder = folder(&names);
    let remove = |name: &str| fs::remove_file(folder.path().join(name)).unwrap();
    let path = folder.path();

    index(&folder, &all);
    let found = find(path).unwrap();
    assert_eq!(tensors(&found), all);
    assert_eq!(found.config.as_ref().unwrap()["model_type"], "llama");
    assert_eq!(found.name, path.display().to_string());
    assert!(found.gguf.is_none());
    remove("model.safetensors.index.json");
    assert_eq!(tensors(&find(path).unwrap()), ["model.safetensors"]);
    remove("model.safetensors");
    assert_eq!(tensors(&find(path).unwrap()), all);
    remove(all[0]);
    assert!(refusal(path).contains("model-00001-of-00002.safetensors is not beside it"));
    remove(all[1]);
    assert_eq!(tensors(&find(path).unwrap()), ["other.safetensors"]);
    remove("other.safetensors");
    let found = find(path).unwrap();
    assert!(found.tensors.is_none() && found.gguf.is_some());
    remove("x.gguf");
    let found = find(path).unwrap();
    assert!(found.tensors.is_none() && found.gguf.is_none() && found.config.is_some());
    remove("config.json");
    let text = refusal(path);
    assert!(text.contains("adapter_model.safetensors") && text.contains("config.json"), "{text}");
}

#[test]
fn several_models_are_listed() {
    let two = folder(&["config.json", "a.gguf", "b.gguf", "mmproj-a.gguf"]);
    let text = refusal(two.path());
    assert!(
        text.contains("2 models") && text.contains("\"a.gguf\", \"b.gguf\"") && text.contains("name the"),
        "{text}"
    );
    let two = folder(&["a.safetensors", "b.safetensors"]);
    assert!(refusal(two.path()).contains("\"a.safetensors\", \"b.safetensors\""));
    assert!(find(&two.path().join("b.safetensors")).unwrap().config.is_none());
    let empty = folder(&[]);
    assert!(refusal(empty.path()).contains("an empty folder"));
}

#[test]
fn an_index_without_any_shard_is_left_over_from_another_form() {
    let folder = folder(&["config.json", "output-00001-of-00001.safetensors"]);
    index(&folder, &["model-00001-of-00002.safetensors"]);
    assert_eq!(tensors(&find(folder.path()).unwrap()), ["output-00001-of-00001.safetensors"]);
    // With one of its shards there it is the model's own.
    index(&folder, &["model-00001-of-00002.safetensors", "output-00001-of-00001.safetensors"]);
    assert!(matches!(find(folder.path()).unwrap_err(), Error::MissingShard { .. }));
    fs::remove_file(folder.path().join("output-00001-of-00001.safetensors")).unwrap();
    assert!(matches!(find(folder.path()).unwrap_err(), Error::MissingShard { .. }));
}

#[test]
fn a_file_is_read_as_what_it_is() {
    let parts = ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"];
    let folder = folder(&["config.json", "model.safetensors", parts[0], parts[1], "x.gguf", "weights.bin"]);
    let path = |name: &str| folder.path().join(name);
    let found = find(&path("model.safetensors")).unwrap();
    assert_eq!(tensors(&found), ["model.safetensors"]);
    assert!(found.config.is_some());
    assert_eq!(tensors(&find(&path(parts[1])).unwrap()), parts);
    index(&folder, &["model.safetensors"]);
    assert_eq!(tensors(&find(&path("model.safetensors.index.json")).unwrap()), ["model.safetensors"]);
    let found = find(&path("config.json")).unwrap();
    assert!(found.config.is_some() && found.tensors.is_none());
    assert!(find(&path("x.gguf")).unwrap().gguf.is_some());
    fs::copy(path("x.gguf"), path("sha256-0123")).unwrap();
    assert!(find(&path("sha256-0123")).unwrap().gguf.is_some());
    assert!(refusal(&path("weights.bin")).contains("weights.bin"));
    assert_eq!(find(&path("none")).unwrap_err().kind(), Kind::MissingFile);
    assert_eq!(find(&path("none.gguf")).unwrap_err().kind(), Kind::MissingFile);
    fs::write(path("x.gguf"), b"PK\x03\x04 and more").unwrap();
    assert!(refusal(&path("x.gguf")).contains("GGUF"));
}

#[test]
fn configurations_are_objects_of_a_sensible_size() {
    let folder = folder(&["config.json", "quantize_config.json"]);
    let found = find(folder.path()).unwrap();
    assert_eq!(found.quantization(), found.quantize_config.as_ref());
    let path = folder.path().join("config.json");
    fs::write(&path, r#"{"quantization_config": {"bits": 4}, "limit": Infinity}"#).unwrap();
    let found = find(folder.path()).unwrap();
    assert_eq!(found.quantization().unwrap()["bits"], 4);
    assert!(found.config.unwrap()["limit"].is_null());
    for (text, wanted) in [
        ("[1]".to_owned(), "a list"),
        ("{".to_owned(), "EOF"),
        (String::new(), "EOF"),
        (format!("{{\"a\": {}1{}}}", "[".repeat(100), "]".repeat(100)), "deeper than 100"),
        (format!("{{\"a\": [{}]}}", vec!["0"; 1_000_000].join(",")), "bytes of memory"),
    ] {
        fs::write(&path, text).unwrap();
        let text = refusal(folder.path());
        assert!(text.contains("config.json: broken config") && text.contains(wanted), "{text}");
    }
    fs::File::create(&path).unwrap().set_len((16 << 20) + 1).unwrap();
    assert!(refusal(folder.path()).contains("16777217"));
}

#[cfg(unix)]
#[test]
fn what_is_no_file_is_not_opened() {
    // A socket: neither a file nor a folder. Reading one would fail or wait.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
    assert!(refusal(&path).contains("neither a file nor a folder"));
}

#[test]
fn files_are_those_whose_tensors_are_found() {
    let sets: [&[&str]; 5] = [
        &["model.safetensors", "model_old.safetensors", "adapter_model.safetensors"],
        &["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "other.safetensors"],
        &["weights.safetensors", "consolidated.safetensors"],
        &["config.json", "adapter_model.safetensors"],
        &["x.gguf"],
    ];
    for names in sets {
        let folder = folder(names);
        let named = |path: &Path| -> Vec<String> {
            let files = safetensors_files(path).unwrap();
            files.iter().map(|file| file.file_name().unwrap().to_string_lossy().into_owned()).collect()
        };
        assert_eq!(named(folder.path()), tensors(&find(folder.path()).unwrap()), "{names:?}");
        for name in names.iter().filter(|name| name.ends_with(".safetensors")) {
            let path = folder.path().join(name);
            assert_eq!(named(&path), tensors(&find(&path).unwrap()), "{name}");
        }
    }
    let folder = folder(&["b.safetensors", "a.safetensors"]);
    assert!(
        safetensors_files(folder.path()).unwrap_err().to_string().contains("name the file that is meant")
    );
    index(&folder, &["b.safetensors", "a.safetensors"]);
    let index = folder.path().join("model.safetensors.index.json");
    let both = [folder.path().join("a.safetensors"), folder.path().join("b.safetensors")];
    assert_eq!(safetensors_files(&index).unwrap(), both);
    assert_eq!(safetensors_files(folder.path()).unwrap(), both);
    fs::remove_file(&both[0]).unwrap();
    let error = safetensors_files(folder.path()).unwrap_err();
    assert!(matches!(error, Error::MissingShard { .. }), "{error}");
}
