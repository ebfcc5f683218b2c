//! Turns what is stored into what goes on the wire. Pure; the other way round is `validate/` and `sessions/parse.rs`.

mod host;
mod image;
mod vm;

pub(crate) use host::{HostExtras, host, host_state};
pub(crate) use image::image;
pub(crate) use vm::{created_vm, phase, spec, vm};

use uncloud_proto::{clock::WallTime, ids::Revision, v1};

use crate::model::{EventRecord, Subject};

/// A time that may not be known: 0 stands for that in what is stored.
fn timestamp(time: WallTime) -> Option<prost_types::Timestamp> {
    (time.0 != 0).then(|| time.to_proto())
}

/// What an agent said, bounded and on one line.
pub(crate) fn line(text: &str) -> String {
    text.chars().take(500).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Something that happened.
pub(crate) fn event(event: &EventRecord, revision: Revision) -> v1::Event {
    let kind = match event.subject {
        Subject::Vm(_) => v1::SubjectKind::Vm,
        Subject::Host(_) => v1::SubjectKind::Host,
        Subject::Image(_) => v1::SubjectKind::Image,
        Subject::Cluster => v1::SubjectKind::Cluster,
    };
    let subject_id = match event.subject {
        Subject::Cluster => String::new(),
        Subject::Vm(_) | Subject::Host(_) | Subject::Image(_) => event.subject.uuid().to_string(),
    };
    v1::Event {
        revision: revision.0,
        subject_kind: kind.into(),
        subject_id,
        subject_name: event.subject_name.clone(),
        r#type: event.kind.to_string(),
        message: event.message.clone(),
        time: timestamp(event.time),
    }
}
