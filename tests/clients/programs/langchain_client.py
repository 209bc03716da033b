"""LangChain's ChatOpenAI: invoke, a second turn, stream, batch, async. Arguments: URL, model."""

import asyncio
import sys

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

URL, MODEL = sys.argv[1:]
chat = ChatOpenAI(base_url=f"{URL}/v1", api_key="none", model=MODEL, temperature=0, max_tokens=16)

first = chat.invoke([SystemMessage("Be brief."), HumanMessage("Say hello.")])
assert first.content and first.usage_metadata["output_tokens"] <= 16
assert chat.invoke([HumanMessage("Say hello."), first, HumanMessage("Again.")]).content
streamed = "".join(part.content for part in chat.stream([SystemMessage("Be brief."), HumanMessage("Say hello.")]))
assert streamed == first.content
chain = ChatPromptTemplate.from_messages([("user", "Name a {thing}.")]) | chat | StrOutputParser()
assert all(chain.batch([{"thing": "colour"}, {"thing": "city"}]))
assert asyncio.run(chat.ainvoke("Say hello.", stop=["\n"])).content
print(first.content)
