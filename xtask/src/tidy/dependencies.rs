//! Who may depend on whom, among the crates of the workspace and beyond.

use serde_json::Value;

use super::{Complaint, File};

/// The direction of ARCHITECTURE.md. Those who are not named may use no crate of the workspace.
const ALLOWED: &[(&str, &[&str])] = &[
    ("pgherd", &["pgherd-agent", "pgherd-api"]),
    (
        "pgherd-agent",
        &["pgherd-dcs", "pgherd-backup", "pgherd-postgres", "pgherd-proxy", "pgherd-api", "pgherd-core"],
    ),
    ("pgherd-backup", &["pgherd-postgres", "pgherd-pgwire", "pgherd-core"]),
    ("pgherd-postgres", &["pgherd-pgwire", "pgherd-core"]),
    ("pgherd-proxy", &["pgherd-pgwire", "pgherd-core"]),
    ("pgherd-dcs", &["pgherd-core"]),
    ("pgherd-core", &[]),
    ("pgherd-pgwire", &[]),
    ("pgherd-api", &[]),
    ("fuzz", &["pgherd-proxy", "pgherd-pgwire"]),
    ("sim", &["pgherd-core"]),
    ("pgherd-testkit", &["pgherd-api"]),
    ("xtask", &[]),
];

/// In tests everybody may use the kit for tests.
const FOR_TESTS: &[&str] = &["pgherd-testkit"];

/// Libraries that one crate has to itself, and why.
const OWNED: &[(&str, &str, &str)] = &[
    (
        "openraft",
        "pgherd-dcs",
        "agreement has one small interface; nobody else knows which Raft is behind it",
    ),
    ("redb", "pgherd-dcs", "the store's log is dcs's own; nobody else may keep state in it"),
    ("object_store", "pgherd-backup", "the repository is backup's own"),
    ("zstd", "pgherd-backup", "the repository is backup's own"),
    ("flate2", "pgherd-backup", "what other programs have kept is read in backup"),
    ("lz4_flex", "pgherd-backup", "what other programs have kept is read in backup"),
    ("bzip2", "pgherd-backup", "what other programs have kept is read in backup"),
];

/// Everything that deciding crates may link besides the standard library.
const PURE: &[(&str, &[&str])] =
    &[("pgherd-core", &["serde", "regex-syntax"]), ("sim", &["serde", "serde_json"])];

/// Packages that must not be built, and why.
const BANNED: &[(&str, &str)] = &[
    ("ring", "TLS has one provider, aws-lc-rs; a second one would have to be patched too"),
    ("openssl", "TLS is rustls, so that the binary runs on any Linux"),
    ("openssl-sys", "TLS is rustls, so that the binary runs on any Linux"),
    ("native-tls", "TLS is rustls, so that the binary runs on any Linux"),
];

/// Packages that are built for this machine at most. A higher number is a decision, not an accident.
const MAX_PACKAGES: usize = 340;

/// What `cargo metadata --no-deps` says.
pub(super) fn check(metadata: &Value) -> Vec<Complaint> {
    let mut complaints = Vec::new();
    let packages = metadata["packages"].as_array().cloned().unwrap_or_default();
    let names: Vec<&str> = packages.iter().filter_map(|package| package["name"].as_str()).collect();
    for package in &packages {
        let name = package["name"].as_str().unwrap_or_default();
        let mut add = |what: String, why| {
            complaints.push(Complaint { path: format!("package {name}"), line: 0, what, why });
        };
        let Some((_, allowed)) = ALLOWED.iter().find(|(known, _)| *known == name) else {
            add(
                "the rule of dependencies does not know this crate".to_owned(),
                "a crate exists only if its boundary forbids something",
            );
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let on = dependency["name"].as_str().unwrap_or_default();
            let for_tests = dependency["kind"] == "dev";
            let in_workspace = names.contains(&on) || on.starts_with("pgherd-");
            if in_workspace && !allowed.contains(&on) && !(for_tests && FOR_TESTS.contains(&on)) {
                add(format!("it depends on {on}"), "dependencies go one way, as ARCHITECTURE.md draws them");
            }
            let owner = OWNED.iter().find(|(library, owner, _)| *library == on && *owner != name);
            if let Some((library, owner, why)) = owner {
                add(format!("it depends on {library}, which belongs to {owner}"), why);
            }
            let pure = PURE.iter().find(|(pure, _)| *pure == name);
            if let Some((_, libraries)) = pure
                && !for_tests
                && !in_workspace
                && !libraries.contains(&on)
            {
                add(
                    format!("it depends on {on}"),
                    "deciding code links nothing that could do more than compute",
                );
            }
        }
    }
    complaints
}

/// What is built, by names.
pub(super) fn check_packages(names: &[String]) -> Vec<Complaint> {
    let complaint = |what: String, why| Complaint { path: "Cargo.lock".to_owned(), line: 0, what, why };
    let mut complaints: Vec<Complaint> = BANNED
        .iter()
        .filter(|(banned, _)| names.iter().any(|name| name == banned))
        .map(|(banned, why)| {
            complaint(format!("{banned} is built; cargo tree -i {banned} shows for whom"), why)
        })
        .collect();
    if names.len() > MAX_PACKAGES {
        let why = "each dependency is argued in the commit that adds it; raise the limit there";
        complaints
            .push(complaint(format!("{} packages are built, more than {MAX_PACKAGES}", names.len()), why));
    }
    complaints
}

/// Where packages come from: one registry, and never a repository that can change under a name.
pub(super) fn check_lock(files: &[File]) -> Vec<Complaint> {
    const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";
    let Some(lock) = files.iter().find(|file| file.path == "Cargo.lock") else {
        let why = "a build must be the same tomorrow";
        return vec![Complaint {
            path: "Cargo.lock".to_owned(),
            line: 0,
            what: "the file is gone".to_owned(),
            why,
        }];
    };
    let sources = lock.text.lines().enumerate().filter_map(|(index, line)| {
        let source = line.strip_prefix("source = \"")?.strip_suffix('"')?;
        Some((index + 1, source))
    });
    let why = "packages come from the one public registry, where a version never changes";
    let strays = sources.filter(|(_, source)| *source != REGISTRY);
    strays.map(|(line, source)| lock.complaint(line, format!("a package comes from {source}"), why)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directions_and_owners_are_held() {
        let package = |name: &str, dependencies: &[(&str, Option<&str>)]| {
            let dependencies: Vec<Value> = dependencies
                .iter()
                .map(|(name, kind)| serde_json::json!({ "name": name, "kind": kind }))
                .collect();
            serde_json::json!({ "name": name, "dependencies": dependencies })
        };
        let metadata = serde_json::json!({ "packages": [
            package("pgherd-core", &[("serde", None), ("proptest", Some("dev")), ("tokio", None)]),
            package("pgherd-dcs", &[("pgherd-core", None), ("openraft", None), ("pgherd-testkit", Some("dev"))]),
            package("pgherd-agent", &[("pgherd-dcs", None), ("redb", None)]),
            package("pgherd-api", &[("pgherd-core", None)]),
            package("pgherd-utils", &[]),
        ]});
        let told: Vec<String> = check(&metadata)
            .iter()
            .map(|complaint| format!("{}: {}", complaint.path, complaint.what))
            .collect();
        assert_eq!(
            told,
            [
                "package pgherd-core: it depends on tokio",
                "package pgherd-agent: it depends on redb, which belongs to pgherd-dcs",
                "package pgherd-api: it depends on pgherd-core",
                "package pgherd-utils: the rule of dependencies does not know this crate",
            ]
        );
    }

    #[test]
    fn packages_are_counted_and_come_from_one_place() {
        let names = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        assert_eq!(check_packages(&names(&["serde", "rustls"])), []);
        assert_eq!(check_packages(&names(&["ring", "openssl-sys"])).len(), 2);
        assert_eq!(check_packages(&vec![String::new(); MAX_PACKAGES + 1]).len(), 1);
        let lock =
            |source: &str| File { path: "Cargo.lock".to_owned(), text: format!("source = \"{source}\"\n") };
        assert_eq!(check_lock(&[lock("registry+https://github.com/rust-lang/crates.io-index")]), []);
        assert_eq!(check_lock(&[lock("git+https://example.com/x")]).len(), 1);
        assert_eq!(check_lock(&[]).len(), 1);
    }
}
