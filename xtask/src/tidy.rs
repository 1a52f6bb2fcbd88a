//! The rules of this project that a program can check, each with its reason.
//!
//! A rule looks at the files of the work tree (or at what cargo says about the workspace) and returns its
//! complaints. Every rule is tested with a tree that breaks it: a rule that finds nothing ever is no rule.

use std::fmt;
use std::path::Path;
use std::process::Command;

mod bans;
mod dependencies;
mod errors;
mod faults;
mod links;
mod places;
mod shape;
mod source;

use source::Source;

/// A broken rule, and why there is such a rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Complaint {
    pub path: String,
    /// From 1; 0 where the whole file is meant.
    pub line: usize,
    pub what: String,
    pub why: &'static str,
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: ", self.path)?,
            line => write!(f, "{}:{line}: ", self.path)?,
        }
        write!(f, "{}\n    {}", self.what, self.why)
    }
}

/// A text file of the work tree, by its path from the root.
pub(crate) struct File {
    pub path: String,
    pub text: String,
}

impl File {
    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    fn is_markdown(&self) -> bool {
        self.path.ends_with(".md")
    }

    fn complaint(&self, line: usize, what: impl Into<String>, why: &'static str) -> Complaint {
        Complaint { path: self.path.clone(), line, what: what.into(), why }
    }
}

/// Every rule, on the work tree at `root`.
pub(crate) fn check(root: &Path) -> Vec<Complaint> {
    let mut complaints = Vec::new();
    let files = match files(root) {
        Ok(files) => files,
        Err(error) => return vec![unreadable(root.display().to_string(), error.to_string())],
    };
    complaints.extend(check_files(&files));
    complaints.extend(dependencies::check_lock(&files));
    match metadata(root) {
        Ok(metadata) => complaints.extend(dependencies::check(&metadata)),
        Err(error) => complaints.push(unreadable("cargo metadata".to_owned(), error)),
    }
    match packages(root) {
        Ok(packages) => complaints.extend(dependencies::check_packages(&packages)),
        Err(error) => complaints.push(unreadable("cargo tree".to_owned(), error)),
    }
    complaints.sort();
    complaints.dedup();
    complaints
}

/// The rules that need nothing but the files.
fn check_files(files: &[File]) -> Vec<Complaint> {
    let sources: Vec<Source<'_>> = files.iter().filter(|file| file.is_rust()).map(Source::new).collect();
    let mut complaints = Vec::new();
    for source in &sources {
        complaints.extend(bans::check(source));
        complaints.extend(places::check(source));
    }
    for file in files {
        complaints.extend(shape::check(file));
    }
    complaints.extend(links::check(files));
    complaints.extend(errors::check(&sources, files));
    complaints.extend(faults::check(files));
    complaints
}

fn unreadable(path: String, error: String) -> Complaint {
    Complaint { path, line: 0, what: error, why: "what cannot be read cannot be checked" }
}

/// The text files that belong to the project: what git knows, and what it would take.
fn files(root: &Path) -> std::io::Result<Vec<File>> {
    let listed = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard", "-z"])
        .current_dir(root)
        .output();
    let paths: Vec<String> = match listed {
        Ok(listed) if listed.status.success() => {
            let names = String::from_utf8_lossy(&listed.stdout);
            names.split('\0').filter(|name| !name.is_empty()).map(str::to_owned).collect()
        }
        // A copy without git, such as an unpacked archive.
        _ => {
            let mut paths = Vec::new();
            walk(root, root, &mut paths)?;
            paths
        }
    };
    let mut files = Vec::new();
    for path in paths {
        // A file that git still lists and that was deleted, or one that is no text.
        let Ok(bytes) = std::fs::read(root.join(&path)) else { continue };
        if let Ok(text) = String::from_utf8(bytes) {
            files.push(File { path, text });
        }
    }
    files.sort_by(|one, other| one.path.cmp(&other.path));
    Ok(files)
}

fn walk(root: &Path, directory: &Path, paths: &mut Vec<String>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if entry.file_type()?.is_dir() {
            if name != "target" && name != ".git" {
                walk(root, &entry.path(), paths)?;
            }
        } else if let Ok(path) = entry.path().strip_prefix(root) {
            paths.push(path.to_string_lossy().into_owned());
        }
    }
    Ok(())
}

fn metadata(root: &Path) -> Result<serde_json::Value, String> {
    let arguments = ["metadata", "--format-version", "1", "--no-deps", "--offline"];
    serde_json::from_str(&cargo_says(root, &arguments)?).map_err(|error| error.to_string())
}

/// Names of all packages that are built for this machine, tests included.
fn packages(root: &Path) -> Result<Vec<String>, String> {
    let arguments = ["tree", "--locked", "--offline", "--workspace", "--prefix", "none", "--format", "{p}"];
    let said = cargo_says(root, &arguments)?;
    let mut names: Vec<String> =
        said.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect();
    names.sort();
    names.dedup();
    Ok(names)
}

fn cargo_says(root: &Path, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(crate::cargo())
        .args(arguments)
        .current_dir(root)
        .output()
        .map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_workspace_is_tidy() {
        let complaints = check(&crate::root());
        let told: Vec<String> = complaints.iter().map(Complaint::to_string).collect();
        assert!(told.is_empty(), "{}", told.join("\n"));
    }
}
