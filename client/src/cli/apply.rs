//! `uncloud apply`: makes VMs as files describe them.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
};

use clap::Args;
use tonic::Code;
use uncloud_proto::v1;

use super::{
    Context, Error,
    vm::{WaitArguments, note_pending, wait_for},
};
use crate::{
    manifest::{self, Change, Desired, Document, Images, Plan},
    output::{self, Format},
    wait::Goal,
};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// A YAML file with one or several VMs; `-` for stdin. May be repeated.
    #[arg(short, long, required = true, value_name = "FILE")]
    file: Vec<PathBuf>,
    /// Only shows what would be changed.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    wait: WaitArguments,
}

/// A document, what there is, and what must be done.
struct Step {
    document: Document,
    vm: Option<v1::Vm>,
    plan: Plan,
}

pub(crate) async fn run(context: &Context, a: Arguments) -> Result<(), Error> {
    let mut steps: Vec<Step> = Vec::new();
    // Everything is read and compared before anything is changed.
    for file in &a.file {
        for document in read(file)? {
            let twice = |s: &Step| {
                s.document.name == document.name
                    && s.document.owner_or(&context.owner) == document.owner_or(&context.owner)
            };
            if steps.iter().any(twice) {
                let message = format!("{}: VM `{}` is described twice", file.display(), document.name);
                return Err(Error::Usage(message));
            }
            steps.push(compare(context, document).await?);
        }
    }
    let impossible: Vec<String> = steps.iter().filter_map(|s| refusal(&s.document.name, &s.plan)).collect();
    if !impossible.is_empty() {
        return Err(Error::Usage(format!("nothing was changed: {}", impossible.join("\n"))));
    }
    for step in steps {
        if !a.dry_run {
            carry_out(context, &step, a.wait).await?;
        }
        say(context.format, &step)?;
    }
    Ok(())
}

/// Reads the documents of a file.
pub(crate) fn read(file: &Path) -> Result<Vec<Document>, Error> {
    let name = if file.as_os_str() == "-" { "stdin".to_owned() } else { file.display().to_string() };
    let bad = |problem: String| Error::Usage(format!("{name}: {problem}"));
    let mut text = String::new();
    let limit = manifest::MAX_BYTES + 1;
    let read = if file.as_os_str() == "-" {
        std::io::stdin().lock().take(limit).read_to_string(&mut text)
    } else {
        std::fs::File::open(file).and_then(|f| f.take(limit).read_to_string(&mut text))
    };
    read.map_err(|e| bad(e.to_string()))?;
    if text.len() as u64 > manifest::MAX_BYTES {
        return Err(bad(format!("has more than {} bytes", manifest::MAX_BYTES)));
    }
    manifest::parse(&text).map_err(bad)
}

async fn compare(context: &Context, document: Document) -> Result<Step, Error> {
    let owner = document.owner_or(&context.owner);
    let request = v1::GetVmRequest { vm: document.name.clone(), owner };
    let vm = match context.client.get_vm(request).await {
        Ok(answer) => answer.vm,
        Err(status) if status.code() == Code::NotFound => None,
        Err(status) => return Err(status.into()),
    };
    if vm.as_ref().is_some_and(|vm| vm.deleting) {
        let message = format!("VM `{}` is being deleted; try again when it is gone", document.name);
        return Err(Error::Failed(message));
    }
    let mut images = Images::new();
    if vm.is_some() {
        for name in document.images() {
            let request = v1::GetImageRequest { image: name.to_owned() };
            let image = context.client.get_image(request).await?.image.unwrap_or_default();
            images.insert(name.to_owned(), image.id);
        }
    }
    let plan = manifest::plan(&document, &context.owner, vm.as_ref(), &images);
    Ok(Step { document, vm, plan })
}

async fn carry_out(context: &Context, step: &Step, wait: WaitArguments) -> Result<(), Error> {
    let client = &context.client;
    let mut vm = step.vm.clone();
    match &step.plan {
        Plan::Create(request) => vm = client.create_vm((**request).clone()).await?.vm,
        Plan::Change { update, power, .. } => {
            if let Some(update) = update {
                vm = client.update_vm((**update).clone()).await?.vm;
                note_pending(vm.as_ref());
            }
            let (id, owner) = vm.as_ref().map(|vm| (vm.id.clone(), vm.owner.clone())).unwrap_or_default();
            match power {
                Some(Desired::Running) => vm = client.start_vm(v1::StartVmRequest { vm: id, owner }).await?.vm,
                Some(Desired::Stopped) => {
                    let request = v1::StopVmRequest { vm: id, owner, force: false };
                    vm = client.stop_vm(request).await?.vm;
                }
                None => {}
            }
        }
        // `run` has refused these.
        Plan::Impossible { .. } => {}
    }
    if wait.wait
        && let Some(vm) = vm
    {
        let stopped = vm.desired() == v1::PowerState::Stopped;
        wait_for(context, vm, if stopped { &Goal::Stopped } else { &Goal::Running }, wait).await?;
    }
    Ok(())
}

fn refusal(name: &str, plan: &Plan) -> Option<String> {
    let Plan::Impossible { changes } = plan else { return None };
    let changes: Vec<String> = changes.iter().map(words).collect();
    Some(format!(
        "VM `{name}` cannot be changed in {}; delete it and create it anew, or make the file say what it is",
        changes.join(", ")
    ))
}

fn words(change: &Change) -> String {
    let shown = |text: &str| if text.is_empty() { "nothing".to_owned() } else { text.to_owned() };
    format!("{} ({} to {})", change.field, shown(&change.from), shown(&change.to))
}

fn say(format: Format, step: &Step) -> Result<(), Error> {
    let (action, changes): (_, &[Change]) = match &step.plan {
        Plan::Create(_) => ("create", &[]),
        Plan::Change { changes, .. } if changes.is_empty() => ("none", &[]),
        Plan::Change { changes, .. } => ("change", changes),
        Plan::Impossible { .. } => return Ok(()),
    };
    let line = match format {
        Format::Json => {
            let change = |c: &Change| serde_json::json!({ "field": c.field, "from": c.from, "to": c.to });
            let changes: Vec<_> = changes.iter().map(change).collect();
            serde_json::json!({ "vm": step.document.name, "action": action, "changes": changes }).to_string()
        }
        Format::Table => {
            let changes: Vec<String> = changes.iter().map(words).collect();
            output::clean(format!("{}  {action}  {}", step.document.name, changes.join(", ")).trim_end())
        }
    };
    Ok(output::print(&line)?)
}
