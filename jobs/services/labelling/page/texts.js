// Words of the page, in English and Chinese.

export const TEXTS = {
  en: {
    title: "Labelling", undo: "Undo", help: "Keys (?)", other: "中文", skip: "Skip", submit: "Submit", copy: "Copy",
    guidelines: "Guidelines", close: "Close", more: "Show all", less: "Show less",
    progress: (done, left) => `${done} done, ${left} left for you`,
    rank: "Rank the replies: 1 is the best. Equal ranks are ties.",
    compare: "Which reply is better, and by how much?",
    rate: "Rate the reply: 5 is the best. Mark what is wrong with it.",
    write: "Write the reply that the assistant should give.",
    prompt: "Write what a user would ask or say here.",
    reviewPrompt: "Another person wrote this prompt. Rate it: 5 is the best. Mark what is wrong with it.",
    reviewReply: "Another person wrote this reply. Rate it: 5 is the best. Mark what is wrong with it.",
    writtenPrompt: "Prompt to review", writtenReply: "Reply to review", conversation: "Conversation",
    reply: (place) => `Reply ${place}`, unrankable: "Not rankable", rankOf: (rank) => `Rank ${rank}`,
    first: (how) => `First: ${how}`, second: (how) => `Second: ${how}`, tie: "Equal",
    strength: { 1: "slightly better", 2: "better", 3: "much better" },
    roles: { user: "User", assistant: "Assistant", system: "System", tool: "Tool", topic: "Topic" },
    flags: {
      spam: "Spam", off_topic: "Off topic", wrong_language: "Wrong language", personal_data: "Personal data",
      harmful: "Harmful", rude: "Rude", wrong_facts: "Wrong facts", cut_off: "Cut off",
    },
    rating: (value) => `${value} of 5`, yourReply: "Your reply", yourPrompt: "Your prompt",
    incompleteRank: "Give every reply a rank, or mark it as not rankable (0).",
    incompleteCompare: "Choose one of the answers.",
    incompleteRate: "Give a rating or a flag.", incompleteWrite: "Write something first.",
    empty: "Nothing is left for you to do now. Thank you! New tasks appear here by themselves.",
    paused: "You get no tasks at the moment. The person who invited you can say why.",
    loading: "Loading…", noLink: "Open this page with the link that you were given.",
    badLink: "This link is not valid, or no longer. Ask for a new one; your unsent answers are kept in this browser.",
    away: (count) => count
      ? `The server does not answer. ${count} of your answers are kept in this browser and sent as soon as it is back.`
      : "The server does not answer. This page tries again by itself.",
    full: (count) => count
      ? `The server has no room left. ${count} of your answers are kept in this browser and sent as soon as there is room.`
      : "The server has no room left. This page tries again by itself.",
    fullDisk: "The server has no room left. Free space on its disk, and try again.",
    noStorage: "This browser keeps nothing for this page. Do not close it while answers are unsent.",
    refused: (why) => `Not accepted: ${why}`, failed: (why) => `This was not done: ${why}`,
    refusedWith: (status) => `the server refused it (${status}).`,
    reasons: {
      answered: "this task was answered or skipped already.", invalid: "the server could not read it.",
      name: "no labeller has this name, or can have it. A name has 1 to 80 printable characters and is not “admin”.",
      no_batch: "there is no such batch.", no_export: "nothing was judged that this file can hold.",
      not_admin: "this is for the admin.", not_last: "only your last task can be opened again.",
      not_yours: "this task was not given to you.", other_answer: "another answer was stored in its place.",
      unfit: "the answer does not fit its task.", too_long: "it is too long.", too_many: "too many requests; wait a moment.",
      other_page: "it came from another page. Open this page with your link again.", not_json: "it was not sent as JSON.",
    },
    keptTexts: (count) => (count === 1 ? "A text of yours was not sent" : `${count} texts of yours were not sent`),
    keptText: "Text that was not sent", notSent: "This text is not sent. It is there again if its task comes back to you.",
    taskGone: "Your task went to somebody else. What you wrote is kept in this browser, below this line.",
    copied: "Copied", discard: "Discard", reallyDiscard: "Really discard?",
    keys: [
      ["1 … 9", "give the marked reply this rank; rate; compare: 1 2 3 for the first, 4 equal, 5 6 7 for the second"],
      ["0", "mark the reply as not rankable"], ["↑ ↓ Tab", "go to another reply"], ["← →", "compare: weaker or stronger"],
      ["Enter", "submit (while you write: Ctrl and Enter)"], ["Backspace", "skip"], ["u", "undo the last answer or skip"],
      ["s", "rate and review: mark as spam"], ["e", "show all of a long reply"], ["?", "show these keys"],
    ],
    admin: {
      tasks: "Tasks", kind: "Kind", items: "Items", judgements: "Judgements", missing: "Missing", alpha: "Alpha",
      kinds: { rank: "Rank", compare: "Compare", rate: "Rate", write: "Write a reply", prompt: "Write a prompt", review: "Review" },
      reviews: (waiting, accepted, rejected) => `Written texts: waiting for reviews ${waiting}, accepted ${accepted}, rejected ${rejected}.`,
      batches: "Batches", batch: "Batch", done: "Done", finish: "Finish", reallyFinish: "Really finish?", reopen: "Reopen",
      people: "People", nobody: "Nobody has been invited yet.", name: "Name", seconds: "Seconds", withOthers: "Tau to others",
      withGold: "Tau to gold", ratings: "Ratings", reviewed: "Reviews", spam: "Spam score", state: "State",
      active: "active", paused: "paused", revoked: "link ended",
      pause: "Pause", resume: "Resume", newLink: "New link", reallyNewLink: "End the old link?",
      revoke: "Revoke", reallyRevoke: "Really revoke?", sameAs: (name) => `same answers as ${name}`,
      inviteName: "Name of a new labeller", invite: "Invite",
      link: (name) => `The link of ${name}, shown only now. Whoever has it answers in this name.`,
      exports: "Export",
      shapes: {
        rankings: "ranks and comparisons, merged, for preferences.path", scores: "mean ratings, for preferences.path",
        demonstrations: "written replies, for demonstrations.path", prompts: "written prompts, for prompts.path",
        judgements: "everything, one judgement per line", oasst: "trees of Open Assistant, with what was judged",
        "hh-rlhf": "pairs in the form of hh-rlhf", ultrafeedback: "mean ratings in the form of UltraFeedback",
        helpsteer2: "mean ratings in the form of HelpSteer 2", helpsteer3: "comparisons in the form of HelpSteer 3",
        arena: "votes in the form of Chatbot Arena", argilla: "records of Argilla 2", "label-studio": "tasks of Label Studio",
      },
    },
  },
  zh: {
    title: "标注", undo: "撤销", help: "按键 (?)", other: "English", skip: "跳过", submit: "提交", copy: "复制",
    guidelines: "指南", close: "关闭", more: "全部显示", less: "收起",
    progress: (done, left) => `已完成 ${done} 项，还剩 ${left} 项`,
    rank: "请为回复排序：1 为最好，可以并列。",
    compare: "哪一条回复更好？好多少？",
    rate: "请为回复打分：5 分最好，并标出其中的问题。",
    write: "请写出助手应当给出的回复。",
    prompt: "请写出用户在这里会提出的问题或会说的话。",
    reviewPrompt: "这条提示由另一人撰写。请打分：5 分最好，并标出其中的问题。",
    reviewReply: "这条回复由另一人撰写。请打分：5 分最好，并标出其中的问题。",
    writtenPrompt: "待审核的提示", writtenReply: "待审核的回复", conversation: "对话",
    reply: (place) => `回复 ${place}`, unrankable: "无法排序", rankOf: (rank) => `第 ${rank} 名`,
    first: (how) => `第一条：${how}`, second: (how) => `第二条：${how}`, tie: "一样好",
    strength: { 1: "略好", 2: "更好", 3: "好得多" },
    roles: { user: "用户", assistant: "助手", system: "系统", tool: "工具", topic: "主题" },
    flags: {
      spam: "垃圾内容", off_topic: "跑题", wrong_language: "语言错误", personal_data: "个人信息",
      harmful: "有害", rude: "无礼", wrong_facts: "事实错误", cut_off: "不完整",
    },
    rating: (value) => `${value} 分（共 5 分）`, yourReply: "你的回复", yourPrompt: "你的提示",
    incompleteRank: "请为每条回复排名，或标为无法排序（0）。",
    incompleteCompare: "请选择一个答案。",
    incompleteRate: "请打分或选择标记。", incompleteWrite: "请先写一些内容。",
    empty: "目前没有需要你做的任务，谢谢！有新任务时会自动出现在这里。",
    paused: "目前不会给你分配任务。请向邀请你的人了解原因。",
    loading: "正在加载…", noLink: "请用收到的链接打开此页面。",
    badLink: "此链接无效或已失效，请索取新的链接；尚未发送的答案仍保存在此浏览器中。",
    away: (count) => count
      ? `服务器没有响应。你的 ${count} 个答案保存在此浏览器中，服务器恢复后会自动发送。`
      : "服务器没有响应，页面会自动重试。",
    full: (count) => count
      ? `服务器空间已满。你的 ${count} 个答案保存在此浏览器中，有空间后会自动发送。`
      : "服务器空间已满，页面会自动重试。",
    fullDisk: "服务器空间已满。请清理其磁盘空间后重试。",
    noStorage: "此浏览器不为本页面保存数据。答案未发送前请不要关闭页面。",
    refused: (why) => `未被接受：${why}`, failed: (why) => `未能完成：${why}`,
    refusedWith: (status) => `服务器拒绝了请求（${status}）。`,
    reasons: {
      answered: "此任务已有答案或已被跳过。", invalid: "服务器无法读取内容。",
      name: "没有这个名字的标注者，或名字不可用。名字须为 1 至 80 个可打印字符，且不能是“admin”。",
      no_batch: "没有这个批次。", no_export: "没有此文件可以容纳的判断。",
      not_admin: "此操作仅限管理员。", not_last: "只能重新打开你的最后一个任务。",
      not_yours: "此任务没有分配给你。", other_answer: "此处已保存了另一个答案。",
      unfit: "答案与任务不符。", too_long: "内容过长。", too_many: "请求过多，请稍候。",
      other_page: "请求来自另一个页面，请用你的链接重新打开此页面。", not_json: "请求不是 JSON 格式。",
    },
    keptTexts: (count) => `你有 ${count} 段文字尚未发送`,
    keptText: "尚未发送的文字", notSent: "这段文字尚未发送。如果该任务再次分配给你，文字会重新出现。",
    taskGone: "你的任务已转给他人。你写的内容保存在此浏览器中，见本行下方。",
    copied: "已复制", discard: "丢弃", reallyDiscard: "确定丢弃？",
    keys: [
      ["1 … 9", "为选中的回复排名；打分；比较：1 2 3 选第一条，4 一样好，5 6 7 选第二条"],
      ["0", "标为无法排序"], ["↑ ↓ Tab", "移动到其他回复"], ["← →", "比较：改变程度"],
      ["Enter", "提交（书写时用 Ctrl+Enter）"], ["Backspace", "跳过"], ["u", "撤销上一个答案或跳过"],
      ["s", "打分与审核：标为垃圾内容"], ["e", "显示长回复的全部内容"], ["?", "显示这些按键"],
    ],
    admin: {
      tasks: "任务", kind: "类型", items: "条目", judgements: "判断", missing: "缺少", alpha: "Alpha",
      kinds: { rank: "排序", compare: "比较", rate: "打分", write: "撰写回复", prompt: "撰写提示", review: "审核" },
      reviews: (waiting, accepted, rejected) => `撰写的文本：${waiting} 条等待审核，${accepted} 条通过，${rejected} 条未通过。`,
      batches: "批次", batch: "批次", done: "进度", finish: "结束", reallyFinish: "确定结束？", reopen: "重新开放",
      people: "人员", nobody: "尚未邀请任何人。", name: "姓名", seconds: "秒数", withOthers: "与他人的 Tau",
      withGold: "与标准答案的 Tau", ratings: "打分相关", reviewed: "审核一致", spam: "垃圾分数", state: "状态",
      active: "正常", paused: "已暂停", revoked: "链接已失效",
      pause: "暂停", resume: "恢复", newLink: "新链接", reallyNewLink: "使旧链接失效？",
      revoke: "撤销链接", reallyRevoke: "确定撤销？", sameAs: (name) => `与 ${name} 的答案相同`,
      inviteName: "新标注者的姓名", invite: "邀请",
      link: (name) => `${name} 的链接，仅显示这一次。持有链接者即以此姓名作答。`,
      exports: "导出",
      shapes: {
        rankings: "合并后的排序与比较，用于 preferences.path", scores: "平均分，用于 preferences.path",
        demonstrations: "撰写的回复，用于 demonstrations.path", prompts: "撰写的提示，用于 prompts.path",
        judgements: "全部内容，每行一个判断", oasst: "Open Assistant 的对话树，含判断结果",
        "hh-rlhf": "hh-rlhf 格式的回复对", ultrafeedback: "UltraFeedback 格式的平均分",
        helpsteer2: "HelpSteer 2 格式的平均分", helpsteer3: "HelpSteer 3 格式的比较",
        arena: "Chatbot Arena 格式的投票", argilla: "Argilla 2 的记录", "label-studio": "Label Studio 的任务",
      },
    },
  },
};

const KEY = "labelling.language";
let current = stored() ?? (navigator.languages?.some((name) => name.startsWith("zh")) && !navigator.language.startsWith("en") ? "zh" : "en");

function stored() {
  try {
    const found = localStorage.getItem(KEY);
    return found in TEXTS ? found : null;
  } catch {
    return null;
  }
}

export function texts() {
  return TEXTS[current];
}

// Why the server refused something.
export function reasonOf({ code, status }) {
  return texts().reasons[code] ?? texts().refusedWith(status);
}

export function language() {
  return current === "zh" ? "zh-Hans" : "en";
}

export function switchLanguage() {
  current = current === "zh" ? "en" : "zh";
  try {
    localStorage.setItem(KEY, current);
  } catch {
    // Then it is chosen again after a reload.
  }
}
