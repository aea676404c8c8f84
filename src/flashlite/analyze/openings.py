"""Beginnings of texts, for a model to go on from: neutral, our own, in many languages and code.

They come from no data set, so that none leaks into what is measured or fitted. Of each language
there are two texts and two questions: one to fit to, one to judge by.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LANGUAGES", "OPENINGS", "Opening"]


@dataclass(frozen=True)
class Opening:
    """Two beginnings of texts, and two questions to a chat model: of each one to fit to, and one to
    measure on.
    """

    language: str
    texts: tuple[str, str]
    questions: tuple[str, str]


OPENINGS = (
    Opening(
        "en",
        ("The history of the city began", "Yesterday the government said"),
        ("What makes a good teacher?", "How do I plant a small garden?"),
    ),
    Opening(
        "es",
        ("La historia de la ciudad comenzó", "Ayer el gobierno anunció"),
        ("¿Qué comida es típica de México?", "¿Cómo puedo ahorrar dinero?"),
    ),
    Opening(
        "fr",
        ("L'histoire de la ville commence", "Hier, le gouvernement a annoncé"),
        ("Comment se forment les nuages ?", "Que visiter à Paris en un jour ?"),
    ),
    Opening(
        "de",
        ("Die Geschichte der Stadt begann", "Gestern teilte die Regierung mit"),
        ("Warum ist der Himmel blau?", "Wie backe ich einen Apfelkuchen?"),
    ),
    Opening(
        "it",
        ("La storia della città iniziò", "Ieri il governo ha annunciato"),
        ("Come si prepara il pane?", "Quali sport fanno bene alla schiena?"),
    ),
    Opening(
        "pt",
        ("A história da cidade começou", "Ontem o governo anunciou"),
        ("Como funciona um motor elétrico?", "O que devo levar para a praia?"),
    ),
    Opening(
        "ru",
        ("История города началась", "Вчера правительство сообщило"),
        ("Почему листья осенью желтеют?", "Как выбрать хорошую книгу?"),
    ),
    Opening(
        "tr",
        ("Şehrin tarihi", "Dün hükümet açıkladı"),
        ("Sağlıklı yaşamak için ne yapmalıyım?", "İyi bir çay nasıl demlenir?"),
    ),
    Opening(
        "vi",
        ("Lịch sử của thành phố bắt đầu", "Hôm qua chính phủ cho biết"),
        ("Làm thế nào để học một ngôn ngữ mới?", "Món ăn nào nấu nhanh nhất?"),
    ),
    Opening(
        "zh",
        ("这座城市的历史始于", "昨天政府宣布"),
        ("怎样才能睡得更好？", "春天适合去哪里旅行？"),
    ),
    Opening(
        "ja",
        ("この町の歴史は", "昨日、政府は"),
        ("日本の四季について教えてください。", "簡単な朝ごはんは何ですか？"),
    ),
    Opening(
        "ko",
        ("이 도시의 역사는", "어제 정부는"),
        ("건강한 아침 식사를 추천해 주세요.", "한국어를 어떻게 공부하나요?"),
    ),
    Opening(
        "ar",
        ("بدأ تاريخ المدينة", "أعلنت الحكومة أمس"),
        ("ما هي فوائد القراءة؟", "كيف أتعلم الطبخ؟"),
    ),
    Opening(
        "hi",
        ("शहर का इतिहास", "कल सरकार ने कहा"),
        ("पानी क्यों ज़रूरी है?", "अच्छी नींद कैसे आए?"),
    ),
    Opening(
        "el",
        ("Η ιστορία της πόλης αρχίζει", "Χθες η κυβέρνηση ανακοίνωσε"),
        ("Πώς φτιάχνεται το γιαούρτι;", "Τι να προσέχω όταν αγοράζω ποδήλατο;"),
    ),
    Opening(
        "ro",
        ("Istoria orașului a început", "Ieri guvernul a anunțat"),
        ("De ce este marea sărată?", "Cum pot învăța să cânt la chitară?"),
    ),
    Opening(
        "th",
        ("ประวัติศาสตร์ของเมืองเริ่มต้น", "เมื่อวานนี้รัฐบาลประกาศว่า"),
        ("ทำไมท้องฟ้าจึงเป็นสีฟ้า", "ฉันจะฝึกวิ่งได้อย่างไร"),
    ),
    Opening(
        "code",
        ("def read_lines(path):\n", "#include <stdio.h>\n\nint main("),
        (
            "Write a Python function that reverses a string.",
            "Write a shell command that counts the lines of a file.",
        ),
    ),
)
LANGUAGES = ("ar", "de", "el", "en", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh")
"""Those whose loss is reported one by one."""
