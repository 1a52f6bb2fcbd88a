//! What a keeper does when it is asked for objects.

use std::path::Path;

use bytes::Bytes;
use pgherd_api::objects::{Ask, MAX_OBJECTS_BYTES, Object, Operation, Told, join, split};
use pgherd_api::{Code, Error};
use pgherd_backup::name::Name;
use pgherd_backup::store::{Failure, Listed, Put, Store, StoreError};

use super::to_wire;
use crate::causes::on_one_line;

/// Something that cannot be asked for.
fn malformed(why: impl std::fmt::Display) -> Error {
    Error::of(Code::RequestMalformed).because(why)
}

/// `is_kept`: whether this agent keeps the directory for others.
pub(crate) async fn answer(body: &Bytes, is_kept: impl Fn(&Path) -> bool) -> Result<Bytes, Error> {
    let (Ask { repository, operation }, bytes) = split::<Ask>(body).map_err(malformed)?;
    let path = Path::new(&repository);
    let cause = match is_kept(path) {
        false => Some(format!("this agent keeps no repository in {repository}")),
        // As with one's own: made on the way, it would hide that a disk is not mounted.
        true if !path.is_dir() => Some(format!("there is no directory {repository} on the keeper's host")),
        true => None,
    };
    if cause.is_some() {
        let told = Told::Failed { failure: to_wire(Failure::NoRepository), cause };
        return Ok(join(&told, &[]));
    }
    let store = Store::directory(path);
    Ok(match done(&store, operation, bytes).await? {
        Ok((told, bytes)) => join(&told, &bytes),
        Err(error) => {
            let cause = error.source.as_ref().map(|source| on_one_line(&**source));
            join(&Told::Failed { failure: to_wire(error.failure), cause }, &[])
        }
    })
}

async fn done(
    store: &Store,
    operation: Operation,
    bytes: Bytes,
) -> Result<Result<(Told, Bytes), StoreError>, Error> {
    let name = |text: &str| text.parse::<Name>().map_err(malformed);
    let none = |told| (told, Bytes::new());
    Ok(match operation {
        Operation::Put { name: text } => {
            let put = store.put(&name(&text)?, bytes).await;
            put.map(|put| none(Told::Put { created: put == Put::Created }))
        }
        Operation::Read { name: text, limit } => {
            store.read(&name(&text)?, limit).await.map(|bytes| (Told::Bytes, bytes))
        }
        Operation::ReadRange { name: text, from, to } => {
            let name = name(&text)?;
            let length = to.saturating_sub(from);
            if length > MAX_OBJECTS_BYTES as u64 {
                return Err(malformed(format!("{length} bytes are more than an object has")));
            }
            store.read_range(&name, from..to).await.map(|bytes| (Told::Bytes, bytes))
        }
        Operation::Head { name: text } => {
            store.head(&name(&text)?).await.map(|found| none(Told::Head { object: object(found) }))
        }
        Operation::List { prefix, after, limit } => {
            // A folder is a name, too: nothing leads out of the repository.
            if let Some(folder) = prefix.strip_suffix('/') {
                name(folder)?;
            } else if !prefix.is_empty() {
                return Err(malformed("what is listed is a folder"));
            }
            let after = after.as_deref().map(name).transpose()?;
            let page = store.list(&prefix, after.as_ref(), limit).await;
            page.map(|page| {
                let objects = page.objects.into_iter().map(object).collect();
                none(Told::Page { objects, more: page.more })
            })
        }
        Operation::Delete { name: text } => store.delete(&name(&text)?).await.map(|()| none(Told::Deleted)),
        Operation::Sweep => store.sweep().await.map(|files| none(Told::Swept { files })),
    })
}

fn object(found: Listed) -> Object {
    Object { name: found.name.to_string(), bytes: found.bytes, modified: found.modified.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pgherd_api::objects::Failure as Wire;

    async fn asked(dir: &Path, operation: Operation, bytes: &[u8]) -> Result<(Told, Bytes), Error> {
        let ask = Ask { repository: dir.display().to_string(), operation };
        let answer = answer(&join(&ask, bytes), |path| path.ends_with("kept")).await?;
        Ok(split(&answer).unwrap())
    }

    fn put(name: &str) -> Operation {
        Operation::Put { name: name.to_owned() }
    }

    #[tokio::test]
    async fn a_keeper_does_what_a_directory_does_and_only_there() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path().join("kept");
        std::fs::create_dir(&dir).unwrap();
        let told = |answer: Result<(Told, Bytes), Error>| answer.unwrap();
        assert_eq!(told(asked(&dir, put("format"), b"a\nb").await).0, Told::Put { created: true });
        assert_eq!(told(asked(&dir, put("format"), b"a\nb").await).0, Told::Put { created: false });
        let failed = |answer: Result<(Told, Bytes), Error>| match told(answer).0 {
            Told::Failed { failure, .. } => failure,
            other => panic!("{other:?}"),
        };
        assert_eq!(failed(asked(&dir, put("format"), b"other").await), Wire::Present);
        let read = |name: &str, limit| Operation::Read { name: name.to_owned(), limit };
        assert_eq!(told(asked(&dir, read("format", 9), b"").await), (Told::Bytes, Bytes::from("a\nb")));
        assert_eq!(failed(asked(&dir, read("format", 2), b"").await), Wire::TooLarge);
        assert_eq!(failed(asked(&dir, read("absent", 9), b"").await), Wire::Absent);
        let range = Operation::ReadRange { name: "format".to_owned(), from: 1, to: 3 };
        assert_eq!(told(asked(&dir, range, b"").await).1, "\nb");
        let list = |prefix: &str| Operation::List { prefix: prefix.to_owned(), after: None, limit: 9 };
        asked(&dir, put("packs/one"), b"1").await.unwrap();
        let (Told::Page { objects, more: false }, _) = told(asked(&dir, list("packs/"), b"").await) else {
            panic!("a page")
        };
        assert_eq!(objects.iter().map(|object| object.name.as_str()).collect::<Vec<_>>(), ["packs/one"]);
        let head = Operation::Head { name: "packs/one".to_owned() };
        assert!(matches!(told(asked(&dir, head, b"").await).0, Told::Head { object } if object.bytes == 1));
        assert_eq!(told(asked(&dir, Operation::Sweep, b"").await).0, Told::Swept { files: 0 });
        let delete = Operation::Delete { name: "packs/one".to_owned() };
        assert_eq!(told(asked(&dir, delete, b"").await).0, Told::Deleted);

        // Nothing leads out of it, and nothing that the herd file does not name is touched.
        std::fs::write(temporary.path().join("secret"), "s").unwrap();
        let far = Operation::ReadRange { name: "format".to_owned(), from: 0, to: u64::MAX };
        for wrong in
            [read("../secret", 9), read("/etc/passwd", 9), list("../"), list("packs"), put(".x"), far]
        {
            let refused = asked(&dir, wrong.clone(), b"").await.unwrap_err();
            assert!(refused.is(Code::RequestMalformed), "{wrong:?}");
        }
        let elsewhere = temporary.path();
        assert_eq!(failed(asked(elsewhere, read("secret", 9), b"").await), Wire::NoRepository);
        assert!(answer(&Bytes::from("{}\n"), |_| true).await.unwrap_err().is(Code::RequestMalformed));
    }
}
