//! What keeps the source tree readable, checked by machine: see the names of the tests.

use std::fs;
use std::path::{Path, PathBuf};

use hybridmig_tests::source_root;

const MAX_LINES: usize = 800;
const MAX_COLUMNS: usize = 120;

/// Files of the tree (without what was built, and what is hidden but for two directories), as their
/// path within it and their contents. Files that are not text are left out.
fn files(extensions: &[&str]) -> Vec<(PathBuf, String)> {
    let mut files = Vec::new();
    let mut directories = vec![source_root().to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let hidden = name.starts_with('.') && name != ".ci" && name != ".config";
            if hidden || path.is_symlink() {
                continue;
            }
            if path.is_dir() {
                // Cargo marks its target directory with this tag.
                if !path.join("CACHEDIR.TAG").exists() {
                    directories.push(path);
                }
                continue;
            }
            let extension = path.extension().unwrap_or_default();
            if !extensions.is_empty() && !extensions.iter().any(|wanted| extension == *wanted) {
                continue;
            }
            if let Ok(text) = fs::read_to_string(&path) {
                let within = path.strip_prefix(source_root()).unwrap().to_owned();
                files.push((within, text));
            }
        }
    }
    files
}

fn assert_none(findings: Vec<String>) {
    assert!(findings.is_empty(), "\n{}", findings.join("\n"));
}

#[test]
fn rust_files_are_short() {
    let mut findings = Vec::new();
    let files = files(&["rs"]);
    assert!(files.len() > 30, "only {} files found", files.len());
    for (path, text) in files {
        let lines = text.lines().count();
        if lines > MAX_LINES {
            findings.push(format!("{}: {lines} lines", path.display()));
        }
    }
    assert_none(findings);
}

#[test]
fn rust_files_say_what_they_are_for() {
    let mut findings = Vec::new();
    for (path, text) in files(&["rs"]) {
        let first = text.lines().next().unwrap_or_default();
        if first
            .strip_prefix("//!")
            .is_none_or(|words| words.trim().is_empty())
        {
            findings.push(format!("{}: does not start with '//! …'", path.display()));
        }
    }
    assert_none(findings);
}

#[test]
fn lines_are_short() {
    let mut findings = Vec::new();
    for (path, text) in files(&["rs"]) {
        for (number, line) in text.lines().enumerate() {
            let columns = line.chars().count();
            if columns > MAX_COLUMNS {
                let number = number + 1;
                findings.push(format!("{}:{number}: {columns} columns", path.display()));
            }
        }
    }
    assert_none(findings);
}

#[test]
fn nothing_is_left_undone() {
    // Put together here, so that this file does not find itself.
    let marks = ["todo", "unimplemented", "dbg"].map(|name| format!("{name}!("));
    let mut findings = Vec::new();
    for (path, text) in files(&["rs"]) {
        for (number, line) in text.lines().enumerate() {
            if let Some(mark) = marks.iter().find(|mark| line.contains(*mark)) {
                findings.push(format!("{}:{}: {mark}", path.display(), number + 1));
            }
        }
    }
    assert_none(findings);
}

#[test]
fn links_between_documents_lead_somewhere() {
    let mut findings = Vec::new();
    for (path, text) in files(&["md"]) {
        for link in relative_links(&text) {
            let directory = source_root().join(&path);
            let directory = directory.parent().unwrap_or(Path::new(""));
            if !directory.join(&link).exists() {
                findings.push(format!("{}: no file '{link}'", path.display()));
            }
        }
    }
    assert_none(findings);
}

/// Targets of `[text](target)` that are files: no web addresses, no anchors within the page.
fn relative_links(text: &str) -> Vec<String> {
    let mut links = Vec::new();
    let mut in_code = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        }
        if in_code {
            continue;
        }
        // What stands in backquotes is code as well.
        let prose: String = line.split('`').step_by(2).collect::<Vec<_>>().join("_");
        for rest in prose.split("](").skip(1) {
            let target = rest.split([')', ' ']).next().unwrap_or_default();
            let file = target.split('#').next().unwrap_or_default();
            if !file.is_empty() && !file.contains("://") && !file.starts_with("mailto:") {
                links.push(file.to_owned());
            }
        }
    }
    links
}

#[test]
fn finds_links_in_prose_only() {
    let text = "see [a](a.md) and [b](docs/b.md#part), [web](https://x.org/c.md), [here](#there)\n\
                `x[1](code.md)` [d `e`](d.md)\n```\n[not](f.md)\n```\n[g](g.md \"title\")";
    assert_eq!(relative_links(text), ["a.md", "docs/b.md", "d.md", "g.md"]);
}

#[test]
fn no_paths_of_one_machine() {
    let mut findings = Vec::new();
    for (path, text) in files(&[]) {
        for (number, line) in text.lines().enumerate() {
            if let Some(found) = machine_path(line) {
                findings.push(format!("{}:{}: {found}", path.display(), number + 1));
            }
        }
    }
    assert_none(findings);
}

/// A path that exists on the machine of whoever wrote it only.
fn machine_path(line: &str) -> Option<&'static str> {
    const ROOTS: [&str; 4] = [
        concat!("/ho", "me/"),
        concat!("/ro", "ot/"),
        concat!("/wo", "rk/"),
        concat!("/Us", "ers/"),
    ];
    ROOTS.into_iter().find(|root| {
        line.match_indices(root).any(|(at, _)| {
            // `/proc/1/root/…` and the like are fine: an absolute path starts here or nowhere.
            let before = line[..at].chars().next_back();
            before.is_none_or(|c| !c.is_alphanumeric() && !"/}>._-*)]".contains(c))
        })
    })
}

#[test]
fn knows_a_machine_path() {
    assert!(machine_path(&format!("cd {}x", concat!("/ho", "me/"))).is_some());
    assert!(machine_path(&format!("'{}x'", concat!("/ro", "ot/"))).is_some());
    assert!(machine_path("/proc/17/root/etc, {pid}/root/etc, net/work/x").is_none());
}
