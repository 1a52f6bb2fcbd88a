//! WAL that the repository of a herd lacks comes back from the herd's own nodes.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use crate::backed_up::backup;
use crate::herd::{Herd, wait_for};
use crate::repository::story;

/// Whole segments in the repository: of the newest timeline, by name.
fn segments(herd: &Herd) -> (PathBuf, BTreeSet<String>) {
    let newest = |dir: PathBuf| fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).max().unwrap();
    let dir = newest(newest(herd.dir.join("backups/cluster")).join("wal"));
    let names = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let names = names.filter(|name| name.len() == 24).collect();
    (dir, names)
}

#[test]
fn as_root_a_hole_in_the_repository_is_filled_by_another_node() {
    story("holes::as_root_a_hole_in_the_repository_is_filled_by_another_node", || {
        let herd = Herd::new();
        herd.up();
        herd.wait_whole();
        let owner = wait_for("something that can be restored", || {
            let backup = backup(&herd)?;
            match backup["owner"].as_str().filter(|_| !backup["recovery_window"].is_null()) {
                Some(owner) => Ok(owner.to_owned()),
                None => Err(backup.to_string()),
            }
        });
        let before = segments(&herd).1.len();
        herd.sql(
            "create table kept as select n, repeat(md5(n::text), 8) x from generate_series(1, 400000) n",
        )
        .unwrap();
        let (dir, names) = wait_for("five segments to be archived", || match segments(&herd) {
            (dir, names) if names.len() >= before + 5 => Ok((dir, names)),
            (_, names) => Err(format!("{names:?}")),
        });
        // Two that follow each other are lost, and the owner's server has them no more.
        let lost: Vec<&String> = names.iter().rev().skip(1).take(2).collect();
        let contents: Vec<Vec<u8>> = lost.iter().map(|name| fs::read(dir.join(name)).unwrap()).collect();
        for name in &lost {
            fs::remove_file(dir.join(name)).unwrap();
            fs::remove_file(herd.dir.join(&owner).join("data/pg_wal").join(name)).unwrap();
        }
        assert!(!herd.output(&["backup", "check"]).status.success(), "it is missing");

        // When a base backup has ended the owner looks at what is there.
        herd.run(&["backup", "create"]);
        let told = wait_for("the hole to be filled", || {
            let backup = backup(&herd)?;
            if backup["filled"].is_null() { Err(backup.to_string()) } else { Ok(backup) }
        });
        assert_eq!(told["filled"]["files"], 2, "{told}");
        let from = told["filled"]["from"].as_array().unwrap();
        assert!(!from.is_empty() && from.iter().all(|node| *node != owner.as_str()), "{told}");
        for (name, content) in lost.iter().zip(contents) {
            assert!(fs::read(dir.join(name)).unwrap() == content, "{name}");
        }
        herd.run(&["backup", "check"]);
        wait_for("nothing to be missing", || {
            let backup = backup(&herd)?;
            match backup["gaps"].as_array().unwrap().is_empty() && backup["asked"].is_null() {
                true => Ok(()),
                false => Err(backup.to_string()),
            }
        });
        let shown = herd.run(&["status"]);
        assert!(shown.contains("2 files of WAL that was missing came from"), "{shown}");
        herd.run(&["down", "--delete", "--yes"]);
    });
}
