"""Words of the synthetic tickets: what each class asks, and what the others say in passing.

Requests of one class use words of other classes on purpose (a late reset mail, a charge after
cancelling), so that single words do not give the class away. All names are invented.
"""

REQUESTS: dict[str, tuple[str, ...]] = {
    "account access": (
        "I cannot sign in to {product} since {when}, it says that the password is wrong.",
        "The reset mail for my {product} account never arrives, so I am locked out.",
        "Please unlock my account, I typed the code wrong three times on my {device}.",
        "The sign-in page of {product} keeps sending me back to the start.",
        "I have a new {device} and {product} still asks the old one for the login code.",
        "My colleague left and nobody knows the login of {plan}, how do we get in?",
        "{product} tells me that this address has no account, but I used it {when}.",
        "I was signed out {when} and no password I know works any more.",
        "How can I get back into {product} after losing the phone that receives the codes?",
        "The link to confirm my address has expired and {product} will not let me in.",
    ),
    "billing": (
        "Why does my statement show {amount} for {product} when {plan} costs less?",
        "I was charged {amount} twice {when}, can you check the invoice?",
        "Our accountant needs the invoice of {when} with the company address on it.",
        "Please use the new card for {plan}, the payment {when} was declined.",
        "The tax on the last {product} invoice looks wrong to me.",
        "There is a fee of {amount} on my account that I do not recognise.",
        "Can we pay for {plan} once a year by bank transfer instead of by card?",
        "The receipt for order {order} shows a different amount from what left my bank.",
        "You took {amount} {when} although the trial of {product} had not ended, explain this.",
        "Which of the two payments on {plan} is for {product}?",
    ),
    "bug report": (
        "Since the update {when}, {product} closes as soon as I open the {part}.",
        "The {part} of {product} shows an empty page on my {device}.",
        "{product} loses what I typed whenever the {part} is open.",
        "When I press save in the {part}, an error appears and nothing is stored.",
        "The {part} counts every entry twice, which was right until {when}.",
        "On my {device} the {part} stays grey and does not react.",
        "Dates in the {part} are off by one day, order {order} is an example.",
        "{product} freezes for a minute when I go from the {part} to the payment page.",
        "The export from the {part} stops half way, the file is cut off.",
        "I think I found a fault, the {part} sorts {amount} before $9.",
    ),
    "cancellation": (
        "Please end {plan}, I do not want it to renew.",
        "We will not need {product} after this month, how do I stop the subscription?",
        "I would like to close my {product} account and leave for good.",
        "Take me off {plan} before the next payment of {amount} is due.",
        "Order {order} has not shipped yet, I no longer want it, so stop it.",
        "The trial of {product} was enough for me, do not continue with {plan}.",
        "I asked {when} to have {plan} stopped and it is still active.",
        "How much notice do I have to give to get out of {plan}?",
        "Please delete my profile and everything that {product} holds about me.",
        "Our team is moving to another tool, so this is our notice for {plan}.",
    ),
    "delivery": (
        "Order {order} was due {when} and has not come.",
        "The tracking page of order {order} has said the same thing since {when}.",
        "Where is my {product} box, the courier says it was handed over?",
        "The parcel went to my old address, can you send it on to {city}?",
        "Only half of order {order} was in the box that came {when}.",
        "Can order {order} be left with a neighbour in {city}?",
        "How long does a {product} kit take to reach {city}?",
        "The box for order {order} arrived crushed and wet.",
        "I got someone else's parcel {when}, mine is order {order}.",
        "I paid {amount} for express and the kit is still in {city}.",
    ),
    "feature request": (
        "It would help if {product} could {ability}.",
        "Please add a way to {ability}, we do it by hand today.",
        "Is there any plan to let {product} {ability}?",
        "I miss a dark mode in the {part}.",
        "We would upgrade from {plan} at once if you let us {ability}.",
        "Could the {part} remember my last settings in a future version?",
        "Other tools {ability}, it would be great to have that here too.",
        "My wish for the next release is a larger {part} on the {device}.",
        "Have you thought of letting the {part} {ability}?",
        "A button to undo the last payment entry would save us hours.",
    ),
    "product question": (
        "Does {product} {ability} out of the box?",
        "Which plan do I need so that I can {ability}?",
        "Where in the {part} do I find last month's numbers?",
        "What is the difference between {product} and {plan}?",
        "Does {product} run on an older {device}?",
        "How many people can use {plan} at the same time?",
        "Before I buy, can {product} work without a connection?",
        "How do I change the language of the {part}?",
        "Is {product} included in {plan} or sold on its own?",
        "What does the small number beside the {part} mean?",
    ),
    "refund": (
        "I sent {product} back {when} and {amount} has still not reached my card.",
        "I want my money back for order {order}.",
        "Please return the {amount}, {plan} was stopped before it was due.",
        "The kit came broken and I would rather have the {amount} than a new one.",
        "You promised {when} to pay back order {order}, nothing has happened.",
        "Can I still return {product} and get the {amount} I paid?",
        "Since {plan} never worked for us, we ask for what we paid.",
        "Nobody used {product} after {when}, please give us back the rest of the year.",
        "How long until the {amount} for the returned kit is on my account?",
        "I was charged although I had left, so I expect the {amount} back.",
    ),
}

ASIDES: dict[str, tuple[str, ...]] = {
    "account access": (
        "Signing in works again, thank you for that.",
        "The password trouble of {when} is solved.",
        "I can log in on my {device} without problems.",
        "My colleague was locked out {when}, but that is settled.",
    ),
    "billing": (
        "The invoice of {when} was correct.",
        "I pay {amount} a month for {plan}.",
        "The payment of {amount} went through {when}.",
        "My card is charged on the first, which is fine.",
    ),
    "bug report": (
        "The crash in the {part} is gone since {when}.",
        "I once saw an error in the {part}, but it never came back.",
        "The {part} is a bit slow, never mind.",
        "The fault I reported {when} has been repaired.",
    ),
    "cancellation": (
        "I do not want to cancel anything.",
        "A friend ended {plan} last year, I am staying.",
        "I cancelled my other subscription {when} without trouble.",
        "We thought of leaving, but that is off the table.",
    ),
    "delivery": (
        "Order {order} came {when} and in good shape.",
        "The courier to {city} was quick, by the way.",
        "The parcel for our office in {city} is not the problem.",
        "The box arrived a day early.",
    ),
    "feature request": (
        "Great that you added a way to {ability}.",
        "I once asked for a dark mode, that can wait.",
        "The wish I sent {when} is not urgent.",
        "Some day it would be nice to {ability}, but not now.",
    ),
    "product question": (
        "I know how to {ability}.",
        "Your help page on the {part} answered my other question.",
        "I have read what {plan} includes.",
        "Someone explained the {part} to me {when}.",
    ),
    "refund": (
        "The refund for order {order} came {when}, thanks.",
        "I am not asking for money back.",
        "My neighbour got her {amount} back within days.",
        "The return of the other kit is settled.",
    ),
}

# Put before a request of another class: that request does not decide the class of the ticket.
SIDE_MARKERS = (
    "Not urgent, but ",
    "A smaller thing: ",
    "On another note, ",
    "Some other time: ",
    "By the way, ",
    "When you have a minute: ",
    "Less important: ",
    "As a side question, ",
)

BACKGROUND = (
    "We are a team of four in {city} and use {product} every day.",
    "I have been on {plan} since {when}.",
    "I bought {product} {when} for our office in {city}.",
    "My sister and I share {plan} and a {device}.",
    "This is about {product}.",
    "I am writing from {city} on my {device}.",
    "I wrote {when} already and heard nothing.",
    "It took me a while to find this form.",
    "I mostly use the {part} on my {device}.",
    "We run a small shop in {city}.",
)

CLOSINGS = (
    "Thanks in advance.",
    "Please answer within a week.",
    "I am available by phone in the morning.",
    "This is rather urgent for us.",
    "No hurry.",
    "I hope you can help me.",
    "I would like a clear answer this time.",
    "Best wishes from {city}.",
    "I really like {product} otherwise.",
    "This is the third time I write about it.",
    "Let me know if you need more details.",
    "A short reply is enough.",
)

GREETINGS = ("Hi, ", "Hello, ", "Hello team, ", "Good morning, ", "Dear support, ", "Hey there, ")

SLOTS: dict[str, tuple[str, ...]] = {
    "product": (
        "Tallyfern", "Brindlebox", "Quillmoor", "Nimbrook", "Ostrel Desk", "Pebblewire",
        "Sorrelkit", "Vantower", "Hushlamp", "Marrowgate", "Cindermap", "Lanternote",
        "Wickerlog", "Flintpad",
    ),
    "plan": (
        "the basic plan", "the family plan", "the team plan", "the yearly plan", "the pro tier",
        "our subscription", "the student plan", "the plus package",
    ),
    "part": (
        "calendar", "inbox", "report page", "search box", "photo view", "task list", "map",
        "chat window", "statistics tab", "address book", "invoice list", "order page",
    ),
    "ability": (
        "export to a spreadsheet", "share a folder", "send a weekly summary", "work offline",
        "show two accounts side by side", "merge duplicate contacts", "scan receipts",
        "print labels", "track a parcel", "split a payment", "remind me before a renewal",
        "sign in with a fingerprint",
    ),
    "device": ("phone", "tablet", "laptop", "home computer", "work phone", "desktop"),
    "when": (
        "yesterday", "last week", "last month", "last Friday", "this morning", "two weeks ago",
        "last Tuesday", "last weekend", "three days ago", "last spring", "a month ago",
    ),
    "city": (
        "Lower Hexby", "Port Almond", "Karsund", "Velmara", "Dunmere", "Ostrow Hill", "Tarnbeck",
        "Saint Orla",
    ),
}  # fmt: skip

SECRETS = (
    "The access code of {name} is {code}.",
    "{name} opens the safe with {code}.",
    "For the record, the recovery code of {name} is {code}.",
    "Please note that {name} has the door code {code}.",
)


def invented_names() -> tuple[str, ...]:
    """All names that a secret can be about: 40 × 40 first and last names of joined syllables."""
    first = [a + b for a in _FIRST_A for b in _FIRST_B]
    last = [a + b for a in _LAST_A for b in _LAST_B]
    return tuple(f"{one} {two}" for one in first for two in last)


_FIRST_A = ("Wren", "Tav", "Ombr", "Jess", "Quil", "Mar", "Ild", "Phel")
_FIRST_B = ("na", "ico", "essa", "orin", "aly")
_LAST_A = ("Tallo", "Brim", "Varn", "Hesk", "Orro", "Lund", "Pell", "Cast")
_LAST_B = ("way", "foss", "quist", "ander", "moor")
